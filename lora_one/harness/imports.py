"""Imports torch and what builds on it for a process that does one run."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """Keep what is imported inside out of all garbage collections.

    A run asks for many of them, and none would free a library: they are a quarter of the time of
    a short run. A process that has torch already is left alone, since its garbage would be kept.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
