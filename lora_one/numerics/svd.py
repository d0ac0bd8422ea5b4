"""Truncated singular value decompositions: exact where that is cheap, block Lanczos elsewhere.

The matrix may be the sum of what several processes hold. Then only its products with a block of
vectors are added up, and no process ever has the whole matrix.
"""

import math
import zlib
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lora_one.numerics.precision import full_precision

EXACT_SIDE = 128
"""Up to this smaller side, or 6 times the rank, LAPACK's decomposition is as fast as iterating."""
WIDTH = 16
"""Vectors per block: few enough that the basis grows no larger than needed, whatever the rank."""
MAX_COLUMNS = 256
"""Columns of the basis beyond 3 times the rank, where the search stops at the latest."""
SMALLEST_GAP = 0.05
"""Relative gap after the last triplet below which «the» rank-r part is not pinned down further."""

LARGEST_EXPONENT = 40
"""Beyond 2**±40, σ² and what is added to it come near the ends of fp32's range."""
NEW_DIRECTION = 1e-3
"""Below this, relative to about σ_0², what a product adds to the basis is partly rounding."""
OUTSIDE = 0.1
"""Where less of a unit vector than this is outside the basis, a random one goes in its place."""


class Summands(Protocol):
    """The processes that hold one summand of a matrix each, and do the same with it in step."""

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes; may overwrite the tensor."""

    def agree(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor; may overwrite the own one."""


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
        Vh: (rank, n), orthonormal rows; the largest entry of each is positive.
        next_value: the next singular value, 0 where there is none.
        error: estimated sine of the angle to the exact singular subspaces, root mean square over
            the triplets; it bounds the relative error of ``U diag(S) Vh`` in the Frobenius norm,
            if the gap after it is at least ``SMALLEST_GAP``. 0 for LAPACK's decomposition.
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

    It stops by an error estimate, not after a fixed number of steps: ``subspace_error``, from
    residuals that are known from the next block at no cost. Iteration stops when that is below
    ``tolerance``, or when fp32's rounding is reached.

    Args:
        matrix: (m, n), any floating dtype; computed in fp32 (fp64 for fp64).
        rank: number of triplets, at most ``min(m, n)``.
        tolerance: for ``TruncatedSVD.error``.
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
        svd = TruncatedSVD(U[:, :rank], S[:rank], Vh[:rank], following, 0.0, norm)
        return _with_signs(svd)
    generator = private_generator(0) if generator is None else generator
    with full_precision(M.device):
        if m > n:  # the basis lives on the shorter side
            V, S, Uh, *rest = _krylov(M.mT, rank, tolerance, generator, summands)
            return _with_signs(TruncatedSVD(Uh.mT, S, V.mT, *rest))
        return _with_signs(_krylov(M, rank, tolerance, generator, summands))


def expected_columns(rank: int) -> int:
    """Return how large the basis grows, about, on gradients of language models."""
    return 2 * rank + 3 * WIDTH


def subspace_error(S: np.ndarray, residuals: np.ndarray, rank: int) -> float:
    """Estimate the sine of the angle between leading Ritz vectors and exact singular vectors.

    For Ritz pairs (σ_i², u_i) of ``M Mᵀ`` with ``M Mᵀ u_i = σ_i² u_i + Q' c_i``, where Q' has
    orthonormal columns outside the basis, u_i leans to first order

        ``x_i = c_i / (σ_i² - σ_out²)``                     out of the basis, and
        ``z_ij = y_jᵀ x_i``, ``y_j = c_j / (σ_r² - σ_j²)``  towards the Ritz vectors j > r,

    because two directions inside the basis only meet by way of Q' (Nakatsukasa, "Sharp error
    bounds for Ritz vectors and approximate singular vectors", 2020). The usual
    ``|c_i| / (σ_r² - σ_{r+1}²)`` (Davis and Kahan) is far larger where σ_{r+1} is close.
    σ_out, the norm of M outside the basis, is unknown. It is taken to be the Ritz value a quarter
    down the basis: an estimate, not a bound, because random blocks can miss a direction.

    Args:
        S: (k,), Ritz values σ, descending, fp64.
        residuals: (b, k), columns c_i.
        rank: r < k.

    Returns:
        ``sqrt((Σ_i |x_i|² + Σ_ij z_ij²) / r)``, gaps of σ² being taken as no smaller than those of
        a relative gap of ``SMALLEST_GAP`` in σ.
    """
    squares = S * S
    outside = squares[max(rank, len(S) // 4)]
    # More than nothing where M has fewer than r directions: a rounding error over 0 is no number.
    least = np.finfo(S.dtype).eps * squares[0] + np.finfo(S.dtype).tiny
    smallest = (1 - (1 - SMALLEST_GAP) ** 2) * squares[rank - 1] + least
    X = residuals[:, :rank] / np.maximum(squares[:rank] - outside, smallest)
    Y = residuals[:, rank:] / np.maximum(squares[rank - 1] - squares[rank:], smallest)
    Z = Y.T @ X
    return math.sqrt((np.vdot(X, X) + np.vdot(Z, Z)) / rank)


def _with_signs(svd: TruncatedSVD) -> TruncatedSVD:
    """Choose between (u_i, v_i) and (-u_i, -v_i), which LAPACK leaves to rounding errors.

    Two ranks would otherwise start some columns of the factors with the other sign than one
    process does.
    """
    largest = svd.Vh.gather(1, svd.Vh.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(largest)
    return svd._replace(U=svd.U * signs.mT, Vh=svd.Vh * signs)


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
    Q = torch.empty(columns, m, dtype=M.dtype, device=M.device).mT  # basis; a block is contiguous
    P = torch.empty(columns, n, dtype=M.dtype, device=M.device)  # Qᵀ M
    Omega = torch.randn(n, WIDTH, generator=generator, dtype=M.dtype).to(M.device)
    first = whole(_product(M, Omega))
    exponent = math.frexp(float(first.abs().max()))[1]
    if abs(exponent) > LARGEST_EXPONENT:
        size = 2.0**exponent
        svd = _krylov(M / size, rank, tolerance, generator, summands)
        norm = None if svd.norm is None else size * svd.norm
        return svd._replace(S=size * svd.S, next_value=size * svd.next_value, norm=norm)
    block = processes.agree(torch.linalg.qr(first).Q)
    look = 2 * rank + 2 * WIDTH  # with fewer columns it is rarely enough
    for end in range(WIDTH, columns + 1, WIDTH):
        Q[:, end - WIDTH : end] = block
        basis, row = Q[:, :end], whole(_product(M.mT, block))
        P[end - WIDTH : end] = row.mT
        if end == WIDTH:
            scale = float(row.square().sum(0).max())
        remainder = whole(_product(M, row))
        for _ in range(2):  # again, for fp32's rounding
            remainder = remainder.addmm(basis, basis.mT @ remainder, alpha=-1)
        block, R = torch.linalg.qr(remainder)
        R = R.cpu().double().numpy()
        if abs(R.diagonal()).min() <= NEW_DIRECTION * scale:
            block = _outside(basis, block)
        block = processes.agree(block)
        if end < min(look, columns):  # a look costs O(end³), a block without one little
            continue
        # In fp64, because P Pᵀ holds squares: fp32 would blur σ below 1e-3 σ_0. Small from here on:
        # on the CPU, and in NumPy, whose calls cost less than PyTorch's.
        wide = P[:end].double()
        squares, vectors = torch.linalg.eigh((wide @ wide.mT).cpu())
        S = np.sqrt(np.maximum(squares.numpy()[::-1], 0.0))
        W = np.ascontiguousarray(vectors.numpy()[:, ::-1])
        residuals = R @ W[-WIDTH:]
        error = min(subspace_error(S, residuals, rank), 1.0)
        floor = max(S[0], np.finfo(S.dtype).tiny) * eps
        relative = residuals[:, :rank] / np.maximum(S[:rank], floor)
        enough = error <= tolerance or np.linalg.norm(relative) <= 8 * floor
        # A block of vectors makes the error smaller by about 10. Processes look in step.
        more = 0 if enough else max(1, round(math.log10(error / tolerance)))
        more = int(processes.agree(M.new_tensor([float(more)])))
        if more == 0:
            break
        look = end + WIDTH * more
    W_r = torch.from_numpy(W[:, :rank]).to(wide)
    # P Wᵀ = S Vᵀ with orthogonal rows; QR normalises them, and completes them where S = 0.
    V, R = torch.linalg.qr((wide.mT @ W_r).to(M))
    V *= torch.where(R.diagonal() < 0, -1.0, 1.0)
    norm = None
    if summands is not None:
        Omega = torch.randn(n, WIDTH, generator=generator, dtype=M.dtype).to(M.device)
        sketch = whole(_product(M, Omega))
        sketch -= basis @ (basis.mT @ sketch)
        norm = math.sqrt(np.vdot(S, S) + float(sketch.double().square().sum()) / WIDTH)
    S_r = torch.from_numpy(S[:rank]).to(M)
    return TruncatedSVD(basis @ W_r.to(M), S_r, V.mT, float(S[rank]), error, norm)


def _outside(basis: Tensor, block: Tensor) -> Tensor:
    """Return orthonormal columns outside the basis: the block's own, where it has any there.

    Where M has no more directions to give, QR normalises rounding errors, which may lean on the
    basis: unit vectors can be cleaned of it, errors could not. They may also lie inside of it, and
    what cleaning leaves of them again, as where most rows of M are zero. A random direction takes
    their place.
    """
    block = block - basis @ (basis.mT @ block)
    squares, vectors = torch.linalg.eigh(block.mT @ block)
    generator = private_generator(basis.shape[1])
    fresh = torch.randn(block.shape, generator=generator, dtype=block.dtype).to(block.device)
    fresh -= basis @ (basis.mT @ fresh)
    return torch.linalg.qr(torch.where(squares > OUTSIDE**2, block @ vectors, fresh)).Q


def _product(M: Tensor, X: Tensor) -> Tensor:
    """Return ``M X`` (m, b) for a thin X (n, b), reading M along the rows of its memory.

    BLAS can take five times as long for the other of the two ways.
    """
    return M @ X if M.is_contiguous() else (X.mT @ M.mT).mT
