"""Truncated singular value decompositions: exact where that is cheap, block Lanczos elsewhere.

The matrix may be the sum of what several processes hold. Then only its products with a block of
vectors are added up, and no process ever has the whole matrix. It may also be known as a sum of
outer products, which need not be formed.
"""

import math
import zlib
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lora_one.numerics.outer_products import OuterProducts
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
PINNED_DOWN = 0.03
"""Residual, relative to the gap after it, up to which a subspace does not depend on the start."""
NOT_FINITE = "the matrix has entries that are not finite."


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
        norm: Frobenius norm of the matrix, where it is a sum that nobody holds or forms; else None.
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
    matrix: Tensor | OuterProducts,
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
        matrix: (m, n), any floating dtype; computed in fp32 (fp64 for fp64). ``OuterProducts`` are
            formed where LAPACK decomposes them, or once their products have cost more than that.
        rank: number of triplets, at most ``min(m, n)``.
        tolerance: for ``TruncatedSVD.error``.
        generator: source of the Gaussian start; ``None`` means seed 0. Always on the CPU, so that
            every device starts from the same numbers.
        summands: if given, ``matrix`` is this process's summand, of any size compared with the sum.
            Blocks of products are added up over the processes, a matrix that LAPACK decomposes is
            added up itself; results agree up to rounding.

    A matrix that nobody holds, a sum over processes or of outer products, has its norm from the
    triplets that were found and the first block's products, to a percent or two; see ``_norm``.

    Raises:
        ValueError: if ``rank`` is not between 1 and ``min(m, n)``.
        FloatingPointError: if an entry is not finite.
    """
    m, n = matrix.shape
    side = min(m, n)
    if not 1 <= rank <= side:
        raise ValueError(f"rank must be between 1 and {side} for shape ({m}, {n}), got {rank}.")
    M = matrix
    if isinstance(matrix, Tensor):
        M = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if side <= max(EXACT_SIDE, 6 * rank):
        M = M.form() if isinstance(M, OuterProducts) else M
        M = M if summands is None else summands.add_up(M.clone())
        if not torch.isfinite(M).all():
            raise FloatingPointError(NOT_FINITE)
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        following = float(S[rank]) if rank < side else 0.0
        held = summands is None and isinstance(matrix, Tensor)
        norm = None if held else float(S.norm())
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


def cheaper_unformed(m: int, n: int, rank: int) -> bool:
    """Tell whether to decompose ``OuterProducts`` (m, n) is less work than to form them first.

    Each column of the basis is multiplied from both sides, the random start from one. The factor 2
    is for memory: every such product reads all vectors again, forming the matrix reads them once.
    """
    vectors = 2 * expected_columns(rank) + WIDTH
    return m * n >= 2 * vectors * (m + n)


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
    outside = _size_outside(squares, rank)
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
    M: Tensor | OuterProducts,
    rank: int,
    tolerance: float,
    generator: torch.Generator,
    summands: Summands | None,
) -> TruncatedSVD:
    held = summands is None and isinstance(M, Tensor)
    processes = _Alone() if summands is None else summands
    whole = processes.add_up
    m, n = M.shape
    eps = torch.finfo(M.dtype).eps
    columns = min(3 * rank + MAX_COLUMNS, m) // WIDTH * WIDTH
    Q = torch.empty(columns, m, dtype=M.dtype, device=M.device).mT  # basis; a block is contiguous
    P = torch.empty(columns, n, dtype=M.dtype, device=M.device)  # Qᵀ M
    Omega = torch.randn(n, WIDTH, generator=generator, dtype=M.dtype).to(M.device)
    first = whole(_product(M, Omega))
    largest = float(first.abs().max())
    if not math.isfinite(largest):
        raise FloatingPointError(NOT_FINITE)
    exponent = math.frexp(largest)[1]
    if abs(exponent) > LARGEST_EXPONENT:
        size = 2.0**exponent
        svd = _krylov(M / size, rank, tolerance, generator, summands)
        norm = None if svd.norm is None else size * svd.norm
        return svd._replace(S=size * svd.S, next_value=size * svd.next_value, norm=norm)
    block = torch.linalg.qr(first).Q
    look = 2 * rank + 2 * WIDTH  # with fewer columns it is rarely enough
    for end in range(WIDTH, columns + 1, WIDTH):
        block = processes.agree(block)
        Q[:, end - WIDTH : end] = block
        basis, row = Q[:, :end], whole(_product(M.mT, block))
        P[end - WIDTH : end] = row.mT
        if end == WIDTH:
            scale = float(row.square().sum(0).max())
        looking = end >= min(look, columns)  # costs O(end³), a block without a look little
        if looking:
            # In fp64, because P Pᵀ holds squares: fp32 would blur σ below 1e-3 σ_0.
            wide = P[:end].double()
            gram = (wide @ wide.mT).cpu()
            S, W = _ritz_vectors(gram)
            residuals = _expected_remainder(gram, S, rank) @ W[-WIDTH:]
            error, enough = _assess(S, residuals, rank, tolerance, eps)
            if _agreed(enough, summands, Q):
                break  # the next product would only confirm it
        remainder = whole(_product(M, row))
        for _ in range(2):  # again, for fp32's rounding
            remainder = remainder.addmm(basis, basis.mT @ remainder, alpha=-1)
        block, R = torch.linalg.qr(remainder)
        R = R.cpu().double().numpy()
        if looking:
            residuals = R @ W[-WIDTH:]
            error, enough = _assess(S, residuals, rank, tolerance, eps)
            # A block makes the error smaller by about 10 or more.
            more = 0 if enough else max(1, round(math.log10(error / tolerance)))
            more = _agreed(more, summands, Q)
            if more == 0:
                break
            look = end + WIDTH * more
            if isinstance(M, OuterProducts) and 2 * end * (m + n) > m * n:
                M = M.form()  # products have cost as much already, and one with M costs less
        if abs(R.diagonal()).min() <= NEW_DIRECTION * scale:
            block = _outside(basis, block)
    W_r = torch.from_numpy(W[:, :rank]).to(wide)
    # P Wᵀ = S Vᵀ with orthogonal rows; QR normalises them, and completes them where S = 0.
    V, R = torch.linalg.qr((wide.mT @ W_r).to(Q))
    V *= torch.where(R.diagonal() < 0, -1.0, 1.0)
    norm = None if held else _norm(S, W, residuals, rank, basis, first, Omega)
    S_r = torch.from_numpy(S[:rank]).to(Q)
    return TruncatedSVD(basis @ W_r.to(Q), S_r, V.mT, float(S[rank]), error, norm)


def _agreed(number: int, summands: Summands | None, like: Tensor) -> int:
    """Return the first process's number, so that all look, and stop, in step."""
    if summands is None:
        return number
    return int(summands.agree(like.new_tensor([float(number)])))


def _ritz_vectors(gram: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return Ritz values σ (k,) of M, descending, and vectors (k, k) in the basis.

    Small matrices from here on: on the CPU, and in NumPy, whose calls cost less than PyTorch's.

    Args:
        gram: ``Qᵀ M Mᵀ Q``, (k, k), fp64.
    """
    squares, vectors = torch.linalg.eigh(gram)
    S = np.sqrt(np.maximum(squares.numpy()[::-1], 0.0))
    return S, np.ascontiguousarray(vectors.numpy()[:, ::-1])


def _expected_remainder(gram: Tensor, S: np.ndarray, rank: int) -> np.ndarray:
    """Return what the next block's R (b, b) is expected to be at most, without a product with M.

    R is that of ``M N`` outside the basis, N (n, b) being what the last block added to the rows of
    ``P = Qᵀ M``. With ``P Pᵀ = L Lᵀ``, L's last block has the singular values of N. How large M is
    on it is taken from ``_size_outside``. It gave 2 to 27 times the residuals of the
    gradients in ``scripts/benchmark.py``.
    """
    L, failed = torch.linalg.cholesky_ex(gram)
    N = S[0] * np.eye(WIDTH) if failed else L[-WIDTH:, -WIDTH:].T.numpy()
    return _size_outside(S, rank) * N


def _size_outside(S: np.ndarray, rank: int) -> float:
    """Return how large M is taken to be outside the basis: the Ritz value a quarter down."""
    return S[max(rank, len(S) // 4)]


def _assess(
    S: np.ndarray, residuals: np.ndarray, rank: int, tolerance: float, eps: float
) -> tuple[float, bool]:
    """Return the error estimate, and whether it is below the tolerance, or all but rounding."""
    error = min(subspace_error(S, residuals, rank), 1.0)
    floor = max(S[0], np.finfo(S.dtype).tiny) * eps
    relative = residuals[:, :rank] / np.maximum(S[:rank], floor)
    return error, error <= tolerance or bool(np.linalg.norm(relative) <= 8 * floor)


def _norm(
    S: np.ndarray,
    W: np.ndarray,
    residuals: np.ndarray,
    rank: int,
    basis: Tensor,
    first: Tensor,
    Omega: Tensor,
) -> float:
    """Estimate the Frobenius norm of M from what the iteration knows of it.

    For singular vectors U_k and a Gaussian Ω (n, b),

        ``||M||² = Σ_{i<=k} σ_i² + n E ||(I - U_k U_kᵀ) M Ω||² / ||Ω||²``

    (Hutch++, Meyer et al. 2021). M Ω is the first block of the iteration itself. That is allowed
    where U_k spans a subspace of M's that is pinned down, by a gap after it that is large beside
    the residuals: it is the same whatever Ω was. The whole basis is not, nor are a few Ritz vectors
    out of a cluster: they hold M Ω, and nothing of the rest would be seen. So k is the last such
    gap up to b, because a basis shows b copies of a singular value, however many there are.

    Args:
        S: (k,), Ritz values, descending.
        W: (k, k), Ritz vectors in the basis.
        residuals: (b, k), see ``subspace_error``.
        rank: that many are taken to be pinned down.
        basis: (m, k).
        first: (m, b), ``M Ω``.
        Omega: (n, b), Ω.
    """
    squares = S * S
    leaning = np.sqrt(np.square(residuals[:, :WIDTH]).sum(0).cumsum())
    pinned = np.flatnonzero(leaning <= PINNED_DOWN * (squares[:WIDTH] - squares[1 : WIDTH + 1]))
    k = max(rank, int(pinned[-1]) + 1 if len(pinned) else 0)
    known = W[:, :k].T @ (basis.mT @ first).cpu().double().numpy()
    rest = float(first.double().square().sum()) - np.vdot(known, known)
    size = float(Omega.double().square().sum()) / len(Omega)
    return math.sqrt(squares[:k].sum() + max(rest, 0.0) / size)


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


def _product(M: Tensor | OuterProducts, X: Tensor) -> Tensor:
    """Return ``M X`` (m, b) for a thin X (n, b), reading M along the rows of its memory.

    BLAS can take five times as long for the other of the two ways.
    """
    if isinstance(M, OuterProducts) or M.is_contiguous():
        return M @ X
    return (X.mT @ M.mT).mT
