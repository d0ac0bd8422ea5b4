"""The product of two thin factors, looked at without ever being formed."""

import torch
from torch import Tensor


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), S (k,), Vᵀ (k, n) of ``B A = U diag(S) Vᵀ``, k = min(m, r, n), in fp64.

    With ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` the SVD of the small ``R_B R_Aᵀ`` is that of the
    product, rotated: O((m + n) r²) operations. In fp64, because B A may be the small difference of
    two larger products.

    Args:
        B: (m, r).
        A: (r, n).
    """
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, S, Vh @ Q_A.mT


def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Return the singular values of ``B A``, descending, in fp64; see ``product_svd``."""
    R_B = torch.linalg.qr(B.double(), mode="r").R
    R_A = torch.linalg.qr(A.double().mT, mode="r").R
    return torch.linalg.svdvals(R_B @ R_A.mT)


def effective_rank(S: Tensor) -> float:
    """Return ``exp(-Σ p_i ln p_i)`` with ``p = S / Σ S`` (Roy and Vetterli 2007).

    Between 1, where one singular value holds everything, and their number, where all are equal;
    0 for a zero matrix.
    """
    if not S.any():
        return 0.0
    p = S / S.sum()
    return float(torch.special.entr(p).sum().exp())


def truncated_factors(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best approximation of ``B A`` of a rank, and ``Σ σ²`` of what is cut and in all.

    Both factors get the root of the singular values, ``U_r sqrt(S_r)`` and ``sqrt(S_r) V_rᵀ``; a
    product of lower rank is padded with zeros. The error is ``||B A - B_r A_r||_F² = Σ_{i>r} σ_i²``
    (Eckart and Young 1936).

    Args:
        B: (m, r).
        A: (r, n).
        rank: of the result.

    Returns:
        B (m, rank) and A (rank, n) in fp64, the energy cut off, and the whole energy.
    """
    U, S, Vh = product_svd(B, A)
    energy, root = S.square(), S[:rank].sqrt()
    missing = max(rank - root.numel(), 0)
    B = torch.nn.functional.pad(U[:, :rank] * root, (0, missing))
    A = torch.nn.functional.pad(root[:, None] * Vh[:rank], (0, 0, 0, missing))
    return B, A, float(energy[rank:].sum()), float(energy.sum())
