"""Small matrix work on a CPU: an item per core, because no item is large enough to be shared."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

MAX_THREADS = 4
"""Python's own work between two products, which one thread does at a time, is a seventh of all."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Return how many threads ``map_on_cores`` uses at most: PyTorch's, up to ``MAX_THREADS``."""
    return min(torch.get_num_threads(), MAX_THREADS)


def map_on_cores(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return ``[function(item) for item in items]``, each call on one core, without gradients.

    Every call runs PyTorch on a single thread, so its numbers do not depend on how many cores
    there are.
    """
    threads = cores()
    with _one_core_each(), torch.no_grad():
        if threads == 1 or len(items) == 1:
            return [function(item) for item in items]
        calls = [_pool(threads, os.getpid()).submit(function, item) for item in items]
        wait(calls)  # also when one fails: none may go on while the caller has its cores back
        return [call.result() for call in calls]


@contextmanager
def _one_core_each() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Return threads that live on, because a new one has MKL allocate its buffers anew.

    A forked process, which inherits no threads, gets its own.
    """
    all_started = Barrier(threads)

    def start() -> None:
        # MKL keeps one number for all threads: none may set it after the caller has put it back.
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        all_started.wait()

    pool = ThreadPoolExecutor(threads, initializer=start)
    for _ in range(threads):
        pool.submit(int)  # each starts a thread, since none is free before all have started
    return pool
