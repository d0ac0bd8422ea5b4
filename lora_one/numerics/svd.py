"""Truncated singular value decompositions: exact where that is cheap, block Lanczos elsewhere.

The matrix may be the sum of what several processes hold. Then only its products with a block of
vectors are added up, and no process ever has the whole matrix.
"""

import zlib
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

EXACT_SIDE = 128
"""Up to this smaller side, or 6 times the rank, LAPACK's decomposition is as fast as iterating."""
WIDTH = 16
"""Vectors per block: few enough that the basis grows no larger than needed, whatever the rank."""
MAX_COLUMNS = 256
"""Columns of the basis beyond 3 times the rank, where the search stops at the latest."""
SMALLEST_GAP = 0.05
"""Relative gap after the last triplet below which «the» rank-r part is not pinned down further."""

NEW_DIRECTION = 1e-3
"""Below this, relative to σ_0², what a product adds to the basis is taken for partly rounding."""


class Summands(Protocol):
    """The processes that hold one summand of a matrix each, and do the same with it in step."""

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum a contiguous tensor over the processes, in place, and return it."""

    def agree(self, tensor: Tensor) -> Tensor:
        """Overwrite a contiguous tensor by the first process's, in place, and return it."""


class _Alone:
    """One process with the whole matrix."""

    def add_up(self, tensor: Tensor) -> Tensor:
        return tensor

    def agree(self, tensor: Tensor) -> Tensor:
        return tensor


class TruncatedSVD(NamedTuple):
    """``matrix ≈ U diag(S) Vh``, the leading part of a singular value decomposition.

    Attributes:
        U: (m, rank), orthonormal columns.
        S: (rank,), descending.
        Vh: (rank, n), orthonormal rows.
        next_value: the next singular value, 0 where there is none.
        error: estimated sine of the largest angle between these singular subspaces and the exact
            ones, relative to a gap of at least ``SMALLEST_GAP``; 0 for LAPACK's decomposition.
        norm: Frobenius norm of the matrix, where it is a sum that nobody holds; else None.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    next_value: float
    error: float
    norm: float | None = None


def private_generator(seed: int, name: str = "") -> torch.Generator:
    """Return a CPU generator that depends on the seed and a layer's name only.

    The global generator is never touched, and the order in which layers are decomposed does not
    matter.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + zlib.crc32(name.encode())) % 2**63
    return torch.Generator().manual_seed(mixed)


def truncated_svd(
    matrix: Tensor,
    rank: int,
    *,
    tolerance: float = 5e-4,
    generator: torch.Generator | None = None,
    summands: Summands | None = None,
) -> TruncatedSVD:
    """Return the ``rank`` largest singular triplets of a matrix.

    Randomised block Krylov iteration (Musco and Musco 2015) with full reorthogonalisation: an
    orthonormal basis Q of ``span{MΩ, (M Mᵀ) MΩ, (M Mᵀ)² MΩ, ...}`` grows block by block, and the
    triplets are those of ``Qᵀ M``. Compared with subspace iteration (Halko et al. 2011) every
    product with M is kept in the basis instead of being overwritten, which needs about half as
    many products where singular values lie close together, as they do in gradients.

    It stops by an error estimate, not after a fixed number of steps. With Ritz triplets
    (u, σ, v), ``Mᵀ u = σ v`` holds exactly and the residual ``ρ = ||M V - U S||₂`` is known from
    the next block at no cost; by Wedin's theorem the subspaces are off by at most
    ``ρ / (σ_r - σ_{r+1})`` in sine. Iteration stops when that is below ``tolerance``, with the
    gap taken as at least ``SMALLEST_GAP σ_r``, or when fp32's rounding is reached.

    Args:
        matrix: (m, n), any floating dtype; computed in fp32 (fp64 for fp64).
        rank: number of triplets, at most ``min(m, n)``.
        tolerance: for the sine of the angle to the exact singular subspaces.
        generator: source of the Gaussian start; ``None`` means seed 0. Always on the CPU, so that
            every device starts from the same numbers.
        summands: if given, ``matrix`` is this process's summand, of any size compared with the sum.
            Blocks of products are added up over the processes, a matrix that LAPACK decomposes is
            added up itself; results agree up to rounding. The norm is then known from the part
            that was found and a Gaussian sketch of the rest, to a few percent of the rest
            (Hutch++, Meyer et al. 2021).

    Raises:
        ValueError: if ``rank`` is not between 1 and ``min(m, n)``.
    """
    m, n = matrix.shape
    side = min(m, n)
    if not 1 <= rank <= side:
        raise ValueError(f"rank must be between 1 and {side} for shape ({m}, {n}), got {rank}.")
    M = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if side <= max(EXACT_SIDE, 6 * rank):
        M = M if summands is None else summands.add_up(M.clone())
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        following = float(S[rank]) if rank < side else 0.0
        norm = None if summands is None else float(S.norm())
        return TruncatedSVD(U[:, :rank], S[:rank], Vh[:rank], following, 0.0, norm)
    generator = private_generator(0) if generator is None else generator
    if m > n:  # the basis lives on the shorter side
        V, S, Uh, *rest = _krylov(M.mT, rank, tolerance, generator, summands)
        return TruncatedSVD(Uh.mT, S, V.mT, *rest)
    return _krylov(M, rank, tolerance, generator, summands)


def expected_columns(rank: int) -> int:
    """Return how large the basis grows, about, on gradients of language models."""
    return 2 * rank + 3 * WIDTH


def _krylov(
    M: Tensor,
    rank: int,
    tolerance: float,
    generator: torch.Generator,
    summands: Summands | None,
) -> TruncatedSVD:
    processes = _Alone() if summands is None else summands
    whole = processes.add_up
    m, n = M.shape
    eps = torch.finfo(M.dtype).eps
    columns = min(3 * rank + MAX_COLUMNS, m) // WIDTH * WIDTH
    Q = torch.empty(m, columns, dtype=M.dtype, device=M.device)  # basis
    P = torch.empty(columns, n, dtype=M.dtype, device=M.device)  # Qᵀ M
    # fp64, because T holds squares: fp32 would blur σ below 1e-3 σ_0.
    P_wide = torch.empty(columns, n, dtype=torch.float64, device=M.device)
    T = torch.zeros(columns, columns, dtype=torch.float64)  # P Pᵀ, small: solved on the CPU
    Omega = torch.randn(n, WIDTH, generator=generator, dtype=M.dtype).to(M.device)
    block = processes.agree(torch.linalg.qr(whole(Omega.mT @ M.mT).mT).Q.contiguous())
    # A look costs O(end³), a block without one little; with fewer columns it is rarely enough.
    look = 2 * rank + 2 * WIDTH
    for end in range(WIDTH, columns + 1, WIDTH):
        new = slice(end - WIDTH, end)
        Q[:, new] = block
        torch.mm(block.mT, M, out=P[new])
        whole(P[new])
        P_wide[new] = P[new]
        T[:end, new] = (P_wide[:end] @ P_wide[new].mT).cpu()
        T[new, :end] = T[:end, new].mT
        # M Pᵀ without its part in the basis, Q (Qᵀ M) Pᵀ = Q T; as (P Mᵀ)ᵀ, because a product
        # with a transposed M on the left takes twice as long.
        remainder = whole(P[new] @ M.mT).mT - Q[:, :end] @ T[:end, new].to(M)
        remainder -= Q[:, :end] @ (Q[:, :end].mT @ remainder)  # again, for fp32's rounding
        block, R = torch.linalg.qr(remainder)
        R = R.cpu().double()
        if R.diagonal().abs().min() <= NEW_DIRECTION * T.diagonal().max():
            # Where M has no more directions to give, QR normalises rounding errors, which may
            # lean on the basis: unit vectors can be cleaned of it, errors could not.
            block = torch.linalg.qr(block - Q[:, :end] @ (Q[:, :end].mT @ block)).Q
        block = processes.agree(block.contiguous())
        if end <= look and end < columns:
            continue
        look = end + WIDTH
        values, vectors = torch.linalg.eigh(T[:end, :end])
        S, W = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
        floor = S[0].clamp(min=torch.finfo(M.dtype).tiny) * eps
        leading = S[:rank].clamp(min=floor)
        residual = torch.linalg.matrix_norm(R @ (W[new, :rank] / leading), 2)
        gap = torch.maximum(S[rank - 1] - S[rank], SMALLEST_GAP * S[rank - 1]).clamp(min=floor)
        enough = residual <= torch.maximum(tolerance * gap, 8 * floor)
        if processes.agree(M.new_tensor([float(enough)])) > 0:
            break
    W_r = W[:, :rank].to(M)
    # P Wᵀ = S Vᵀ with orthogonal rows; QR normalises them, and completes them where S = 0.
    V, R = torch.linalg.qr(P[:end].mT @ W_r)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0)
    error = float((residual / gap).clamp(max=1))
    norm = None
    if summands is not None:
        Omega = torch.randn(n, WIDTH, generator=generator, dtype=M.dtype).to(M.device)
        sketch = whole(Omega.mT @ M.mT)
        sketch -= (sketch @ Q[:, :end]) @ Q[:, :end].mT
        norm = float((T[:end, :end].trace() + sketch.double().square().sum().cpu() / WIDTH).sqrt())
    return TruncatedSVD(
        Q[:, :end] @ W_r, S[:rank].to(M), (V * signs).mT, float(S[rank]), error, norm
    )
