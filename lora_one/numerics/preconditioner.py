"""The r x r preconditioner of scaled (Riemannian) gradient descent on ``B A``."""

import torch
from torch import Tensor

from lora_one.errors import NonFiniteError
from lora_one.numerics.precision import computing_dtype, full_precision

EPS_FALLBACK = 32
"""Rounding in a Gram matrix stays below a few eps times its trace; 32 leaves a margin."""


def damped_gram_factor(gram: Tensor, damping: float, *, relative: bool = False) -> Tensor:
    """Return L with ``L Lᵀ = P``, ``P = gram + d I``, for a batch of Gram matrices.

    ``d = damping``, or ``damping * trace(gram) / r`` when ``relative``. Where the Cholesky
    factorisation fails, because a rank-deficient factor's rounding errors exceed d, it is
    repeated with ``d + 32 eps trace(gram)``. The decision is made on the device, per matrix,
    without a host synchronisation; matrices that were factorised at once are not changed.

    Args:
        gram: (..., r, r) symmetric positive semi-definite, fp32 or fp64.
        damping: d, not negative.
        relative: whether d is relative to the mean eigenvalue.
    """
    r = gram.shape[-1]
    eye = torch.eye(r, dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eps = torch.finfo(gram.dtype).eps
    if relative:
        # A zero factor has no scale of its own: the smallest normal number keeps P and its inverse
        # finite. In fp32, where it is 1e-38, it is lost beside factors of 1e-16 and more.
        shift = (damping * trace / r).clamp(min=torch.finfo(gram.dtype).tiny)
    else:
        shift = torch.full_like(trace, damping)
    P = gram + shift * eye
    failed = torch.linalg.cholesky_ex(P).info[..., None, None] > 0
    return torch.linalg.cholesky_ex(P + failed * (EPS_FALLBACK * eps * trace) * eye).L


def damped_inverse(gram: Tensor, damping: float, *, relative: bool = False) -> Tensor:
    """Return ``(gram + d I)⁻¹`` (..., r, r) from the Cholesky factor of ``damped_gram_factor``.

    The matrices are r x r and the gradients they meet are r x thousands: one product with the
    inverse reads a gradient once, a solve reads it twice. For symmetric positive definite
    matrices the error bound is the same, eps times the condition number.

    Raises:
        NonFiniteError: for d = 0 and a matrix that is zero. On a GPU nothing waits for that
            check, and the inverse is not finite.
    """
    L = damped_gram_factor(gram, damping, relative=relative)
    if L.device.type == "cpu" and (L.diagonal(dim1=-2, dim2=-1) == 0).any():
        raise NonFiniteError(
            f"a LoRA factor's Gram matrix is singular with damping {damping}: the factor is zero, "
            "as B is at LoRA's own start. Give a positive damping (reg)."
        )
    # Not cholesky_inverse: a CUDA version of it takes one matrix after the other.
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    return inverse.mT @ inverse


def precondition(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    damping: float,
    *,
    relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return ``(Bᵀ B + d I)⁻¹ g_A`` and ``g_B (A Aᵀ + d I)⁻¹``.

    Source: scaled gradient descent (Tong, Ma, Chi 2021) as used for LoRA by Zhang and Pilanci
    (2024) and in LoRA-One. Both sides use the factors passed in, those before the step. With
    d = 0 the product's first-order change is invariant under ``(B R, R⁻¹ A)``.

    Args:
        A: (..., r, n).
        B: (..., m, r).
        grad_A: like A.
        grad_B: like B.
        damping: d, or its ratio to the mean eigenvalue of the Gram matrix if ``relative``.
        relative: see ``damped_gram_factor``.

    Returns:
        Both gradients in the computing dtype: fp32, or fp64 if a factor is.
    """
    dtype = computing_dtype(A, B)
    A, B = A.to(dtype), B.to(dtype)
    with full_precision(A.device):
        K_A = damped_inverse(B.mT @ B, damping, relative=relative)
        K_B = damped_inverse(A @ A.mT, damping, relative=relative)
        return K_A @ grad_A.to(dtype), grad_B.to(dtype) @ K_B
