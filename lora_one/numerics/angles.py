"""Angles between subspaces: where the factors of an adapter point."""

import torch
from torch import Tensor

from lora_one.numerics.precision import computing_dtype


def principal_angles(X: Tensor, Y: Tensor) -> Tensor:
    """Return the principal angles in radians, ascending, between the columns' spans of X and Y.

    With orthonormal bases Q_X, Q_Y the cosines are the singular values of ``Q_Xᵀ Q_Y`` and the
    sines those of ``Q_Y - Q_X Q_Xᵀ Q_Y`` (Björck and Golub 1973). An angle is taken from its sine
    below 45 degrees and from its cosine above, so that small angles keep full precision.

    Args:
        X: (d, p) with independent columns.
        Y: (d, q) with independent columns.

    Returns:
        ``min(p, q)`` angles between 0 and pi/2, in at least fp32.

    Raises:
        ValueError: if X and Y are not matrices with equally many rows and no more columns than
            rows.
    """
    if X.ndim != 2 or Y.ndim != 2 or X.shape[0] != Y.shape[0]:
        raise ValueError(
            f"expected two matrices with equally many rows, got {tuple(X.shape)} and "
            f"{tuple(Y.shape)}."
        )
    if max(X.shape[1], Y.shape[1]) > X.shape[0]:
        raise ValueError(f"more columns than rows: {tuple(X.shape)} and {tuple(Y.shape)}.")
    dtype = computing_dtype(X, Y)
    if X.shape[1] < Y.shape[1]:
        X, Y = Y, X
    Q_X, Q_Y = torch.linalg.qr(X.to(dtype)).Q, torch.linalg.qr(Y.to(dtype)).Q
    C = Q_X.mT @ Q_Y
    cosines = torch.linalg.svdvals(C).clamp(max=1)
    sines = torch.linalg.svdvals(Q_Y - Q_X @ C).clamp(max=1).flip(0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def leading_directions(X: Tensor, k: int) -> Tensor | None:
    """Return orthonormal columns (d, k) that span the k leading left singular vectors of X.

    ``X = Q R`` and ``R = U S Vᵀ`` give ``Q U[:, :k]``, at the cost of ``d p²``.

    Args:
        X: (d, p), at least as many rows as columns.
        k: how many directions, at most p.

    Returns:
        None where X does not have k directions: its k-th singular value is lost in the rounding of
        the first, as all are in a zero factor.
    """
    Q, R = torch.linalg.qr(X.to(torch.promote_types(X.dtype, torch.float32)))
    U, S, _ = torch.linalg.svd(R)
    rounding = X.shape[1] * torch.finfo(S.dtype).eps * S[0]
    return Q @ U[:, :k] if S[k - 1] > rounding else None
