"""Overwrite the gradients of LoRA pairs: stacked on a GPU, where they lie on a CPU."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.narrow_products import NarrowProducts, Pair, fit, narrow_products
from lora_one.numerics.precision import computing_dtype, full_precision
from lora_one.numerics.preconditioner import damped_inverse


@torch.no_grad()
def precondition_pairs(pairs: list[Pair], reg: float, *, relative: bool = False) -> None:
    """Overwrite the pairs' gradients by the preconditioned ones.

    A pair with one gradient missing has the other one preconditioned; a pair without gradients
    is left alone. The r x r matrices of all shapes are factorised in one batch. On a GPU all pairs
    of one shape are stacked, because launching a kernel costs more than copying them, and nothing
    waits for the device. On a CPU stacking costs more than all the rest, so each gradient is
    multiplied where it lies: by ``narrow_products`` on all cores, or, what those do not take, by
    PyTorch on one. Both are exact to fp32's rounding, which differs.
    """
    groups: dict[tuple[Any, ...], list[Pair]] = defaultdict(list)
    for A, B in pairs:
        if A.grad is None and B.grad is None:
            continue
        way = _way_on_a_cpu(A, B) if A.device.type == "cpu" else None
        groups[A.device, A.shape[0], A.dtype, B.dtype, way].append((A, B))
    for (device, *_, way), group in groups.items():
        with full_precision(device):
            if way is None:
                _precondition_stacked(group, reg, relative)
            elif way == "compiled" and (products := narrow_products(group)) is not None:
                _precondition_compiled(group, reg, relative, products)
            else:
                with _one_core():
                    _precondition_one_by_one(group, reg, relative)


def _way_on_a_cpu(A: nn.Parameter, B: nn.Parameter) -> str:
    if fit(A, B):
        return "compiled"
    return "folded" if _foldable(B) else "plain"


def _precondition_stacked(group: list[Pair], reg: float, relative: bool) -> None:
    dtype = computing_dtype(*group[0])
    alike: dict[tuple[torch.Size, torch.Size], list[Pair]] = defaultdict(list)
    for A, B in group:
        alike[A.shape, B.shape].append((A, B))
    grams = []
    for pairs in alike.values():
        A, B = (torch.stack(factors).to(dtype) for factors in zip(*pairs, strict=True))
        grams += [B.mT @ B, A @ A.mT]
    inverses = damped_inverse(torch.cat(grams), reg, relative=relative)
    K = iter(inverses.split([len(gram) for gram in grams]))
    for pairs in alike.values():
        factors_A, factors_B = zip(*pairs, strict=True)
        _overwrite(factors_A, next(K) @ _stacked_gradients(factors_A).to(dtype))
        _overwrite(factors_B, _stacked_gradients(factors_B).to(dtype) @ next(K))


def _stacked_gradients(factors: Sequence[nn.Parameter]) -> Tensor:
    return torch.stack([torch.zeros_like(f) if f.grad is None else f.grad for f in factors])


def _overwrite(factors: Sequence[nn.Parameter], values: Tensor) -> None:
    present = [(f.grad, v) for f, v in zip(factors, values, strict=True) if f.grad is not None]
    if present:
        torch._foreach_copy_([old for old, _ in present], [new for _, new in present])


def _precondition_compiled(
    group: list[Pair], reg: float, relative: bool, products: NarrowProducts
) -> None:
    grams_A, grams_B = products.grams(group)
    with _one_core():
        K_A, K_B = damped_inverse(torch.stack([grams_B, grams_A]), reg, relative=relative)
    products.multiply(group, K_A, K_B)


@contextmanager
def _one_core() -> Iterator[None]:
    """Let PyTorch use one core: products this small cost more to share than to do."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)


def _precondition_one_by_one(group: list[Pair], reg: float, relative: bool) -> None:
    """Collect the r x r matrices, factorise them in one batch, multiply gradient by gradient."""
    A, B = group[0]
    dtype = computing_dtype(A, B)
    r, count, folded = A.shape[0], len(group), _foldable(B)
    width = 2 * r if folded else r
    grams_A = torch.empty(count, r, r, dtype=dtype)
    grams_B = torch.empty(count, width, width, dtype=dtype)
    for (A, B), gram_A, gram_B in zip(group, grams_A, grams_B, strict=True):
        A, B = _as(dtype, A), _as(dtype, B.view(-1, width) if folded else B)
        torch.mm(A, A.T, out=gram_A)
        torch.mm(B.T, B, out=gram_B)
    if folded:
        grams_B = grams_B[:, :r, :r] + grams_B[:, r:, r:]
    K_A, K_B = damped_inverse(torch.stack([grams_B, grams_A]), reg, relative=relative)
    if folded:
        K = K_B.new_zeros(count, width, width)
        K[:, :r, :r] = K[:, r:, r:] = K_B
        K_B = K
    buffers: dict[torch.Size, Tensor] = {}  # one per shape, so that they stay in the cache
    for (A, B), k_A, k_B in zip(group, K_A, K_B, strict=True):
        if (gradient := A.grad) is not None:
            product = torch.mm(k_A, _as(dtype, gradient), out=_like(gradient, dtype, buffers))
            gradient.copy_(product)
        if (gradient := B.grad) is not None:
            gradient = gradient.view(-1, width) if folded else gradient
            product = torch.mm(_as(dtype, gradient), k_B, out=_like(gradient, dtype, buffers))
            gradient.copy_(product)


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # Even a conversion that changes nothing costs as much as starting a product.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _like(gradient: Tensor, dtype: torch.dtype, buffers: dict[torch.Size, Tensor]) -> Tensor:
    buffer = buffers.get(gradient.shape)
    if buffer is None:
        buffer = buffers[gradient.shape] = torch.empty(gradient.shape, dtype=dtype)
    return buffer


def _foldable(B: Tensor) -> bool:
    """Whether B (m, r) and its gradient are read as (m/2, 2r), two rows side by side.

    A product with 8 columns leaves half of a vector register empty. In twice the width, B's Gram
    matrix is the sum of two diagonal blocks, and costs half the time.
    """
    contiguous = B.is_contiguous() and (B.grad is None or B.grad.is_contiguous())
    return B.shape[1] <= 8 and B.shape[0] % 2 == 0 and contiguous
