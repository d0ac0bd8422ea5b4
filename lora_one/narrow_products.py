"""Products of many narrow LoRA factors on a CPU, compiled for their rank when first needed."""

import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

Pair = tuple[nn.Parameter, nn.Parameter]

SOURCE = Path(__file__).with_suffix(".c")
WIDEST = 32
"""Rank from which on a BLAS product is as fast."""
WORTH_COMPILING = 2**20
"""Numbers in all factors below which a training run hardly gains the time that compiling takes."""
PAIRS_PER_THREAD = 8
"""Fewer take less time than a thread takes to start."""
SECONDS = 60
"""Compiling takes less than one."""

log = logging.getLogger(__name__)


class NarrowProducts:
    """``narrow_products.c``, compiled for one rank r, on PyTorch's number of threads.

    All pairs A (r, n), B (m, r) and their gradients must be ``fit``.
    """

    def __init__(self, library: ctypes.CDLL, rank: int) -> None:
        self._library, self._rank = library, rank

    def grams(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Return ``A Aᵀ`` and ``Bᵀ B`` of each pair, both (len(pairs), r, r)."""
        # Whatever torch.set_default_dtype and torch.set_default_device say.
        shape = (2, len(pairs), self._rank, self._rank)
        grams_A, grams_B = torch.empty(shape, dtype=torch.float32, device="cpu")
        factors = [[factor.data_ptr() for factor in side] for side in zip(*pairs, strict=True)]
        self._call(self._library.grams, pairs, *factors, grams_A, grams_B)
        return grams_A, grams_B

    def multiply(self, pairs: Sequence[Pair], K_A: Tensor, K_B: Tensor) -> None:
        """Overwrite the gradients that there are: ``g_A <- K_A g_A``, ``g_B <- g_B K_B``."""
        gradients = [
            [None if factor.grad is None else factor.grad.data_ptr() for factor in side]
            for side in zip(*pairs, strict=True)
        ]
        self._call(self._library.multiply, pairs, *gradients, K_A.contiguous(), K_B.contiguous())

    def _call(
        self,
        function: ctypes._CFuncPtr,
        pairs: Sequence[Pair],
        of_A: list[int | None],
        of_B: list[int | None],
        *matrices: Tensor,
    ) -> None:
        count = len(pairs)
        pointers, lengths = ctypes.c_void_p * count, ctypes.c_int64 * count
        arguments = (
            ctypes.byref(ctypes.c_int64(0)),
            ctypes.c_int64(count),
            pointers(*of_A),
            pointers(*of_B),
            lengths(*[A.shape[1] for A, _ in pairs]),
            lengths(*[B.shape[0] for _, B in pairs]),
            *[ctypes.c_void_p(matrix.data_ptr()) for matrix in matrices],
        )
        # ctypes gives the interpreter back while C computes. Not OpenMP: a second runtime of it
        # beside PyTorch's own can end the process.
        threads = min(torch.get_num_threads(), -(-count // PAIRS_PER_THREAD))
        with ThreadPoolExecutor(threads) as pool:
            for work in [pool.submit(function, *arguments) for _ in range(threads)]:
                work.result()


def fit(A: nn.Parameter, B: nn.Parameter) -> bool:
    """Whether A (r, n), B (m, r) and their gradients are what the compiled products read."""
    (r, n), m = A.shape, B.shape[0]
    return (
        r % 8 == n % 8 == m % 4 == 0
        and r <= WIDEST
        and all(
            tensor.dtype == torch.float32 and tensor.is_contiguous()
            for tensor in (A, B, A.grad, B.grad)
            if tensor is not None
        )
        and all(type(gradient) in (Tensor, type(None)) for gradient in (A.grad, B.grad))
    )


def narrow_products(pairs: Sequence[Pair]) -> NarrowProducts | None:
    """Return the compiled products for pairs that are ``fit`` and of one rank.

    None if the pairs are too small to be worth it, or if no C compiler (``CC``, else ``cc``) can
    build them; why is logged.
    """
    if sum(A.numel() + B.numel() for A, B in pairs) < WORTH_COMPILING:
        return None
    return _compiled(pairs[0][0].shape[0]).result()


def start_compiling(pairs: Sequence[Pair]) -> None:
    """Compile what a step on the pairs will need, in the background until the first step."""
    sizes: Counter[int] = Counter()
    for A, B in pairs:
        if A.device.type == "cpu" and fit(A, B):
            sizes[A.shape[0]] += A.numel() + B.numel()
    for rank, size in sizes.items():
        if size >= WORTH_COMPILING:
            _compiled(rank)


@functools.cache
def _compiled(rank: int) -> Future[NarrowProducts | None]:
    pool = ThreadPoolExecutor(1)
    library = pool.submit(_compile, rank)
    pool.shutdown(wait=False)
    return library


# A process that is forked meanwhile has not the thread that compiles.
os.register_at_fork(after_in_child=_compiled.cache_clear)


def _compile(rank: int) -> NarrowProducts | None:
    # For this very processor, and so in no cache that nodes of a cluster might share. No option
    # that lets the compiler assume finite numbers: a NaN stays one.
    options = ["-O3", "-march=native", "-shared", "-fPIC", f"-DRANK={rank}"]
    try:
        compiler = shlex.split(os.environ.get("CC") or "cc")
        # On NFS a library that is loaded cannot be deleted.
        with tempfile.TemporaryDirectory(prefix="lora-one-", ignore_cleanup_errors=True) as folder:
            target = str(Path(folder) / f"narrow_products_{rank}.so")
            command = [*compiler, *options, str(SOURCE), "-o", target]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            return NarrowProducts(ctypes.CDLL(target), rank)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        log.info("LoRA gradients are multiplied by PyTorch; nothing compiled for a CPU: %s", said)
        return None
