"""In which precision the library computes, whatever the caller allows his model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def computing_dtype(*operands: Tensor) -> torch.dtype:
    """Return the dtype that all operands fit in, fp32 at least."""
    dtype = torch.float32
    for operand in operands:
        dtype = torch.promote_types(dtype, operand.dtype)
    return dtype


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply fp32 matrices in fp32 while the context lasts, whatever the caller allows.

    Autocast multiplies in half precision. ``torch.set_float32_matmul_precision("high")`` and
    ``TrainingArguments(tf32=True)`` let a GPU round operands to TF32's 10 bits. That is enough for
    a model's passes, and for the gradients taken from them. It is not for Gram matrices with a
    damping of 1e-6, for a decomposition that stops at an error of 5e-4, or for an offset.

    Args:
        device: of the operands.
    """
    allowed = [(backend, backend.fp32_precision) for backend in _BACKENDS]
    rounded = [(backend, name) for backend, name in allowed if name not in ("none", "ieee")]
    try:
        for backend, _ in rounded:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, name in rounded:
            backend.fp32_precision = "none"  # as torch.backends.fp32_precision says, if it does
            if backend.fp32_precision != name:
                backend.fp32_precision = name
