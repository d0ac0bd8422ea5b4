"""One thread for every test process: the models are tiny, and some tests run several at once."""

import gc
import os
from collections import Counter

import pytest

# Read when torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where bitsandbytes is installed PEFT imports it, and it calls torch.compile while it is imported:
# a fifth of the time that a process of the tests takes to import torch, transformers and PEFT.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the files with the most slow tests first: none is left for one worker at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """Keep the libraries out of garbage collections: runs ask for many, and they stay anyway."""
    gc.collect()
    gc.freeze()
