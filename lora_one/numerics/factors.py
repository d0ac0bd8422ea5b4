"""How an adapter starts: one pure function per method; ``methods.py`` lists them.

Names and shapes as in PEFT: the frozen weight W is (m, n) = (out, in), ``lora_B`` is B (m, r),
``lora_A`` is A (r, n), and the layer adds ``s B A x``. G is the mean gradient of the training
loss with respect to W, and ``-G = U S Vᵀ``. (The LoRA-One paper calls PEFT's B «A0» and PEFT's A
«B0».) ``gamma`` is the official ``init.stable_gamma``, the inverse of the paper's γ.

``scale`` multiplies both factors of the methods whose size is free, with ``m̂ = m^(1/4)`` and
``n̂ = n^(1/4)`` where the method has them:

=========  ==================================================================
stable     1 / sqrt(gamma), with m̂ or n̂ where the method says so
unit       1
gd         1 / s
weightS    mean over i < r of sqrt(σ_i(W) / s)
=========  ==================================================================

A new method is one function here and one line in ``lora_one.numerics.methods``.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_one.errors import not_finite
from lora_one.numerics.outer_products import OuterProducts
from lora_one.numerics.svd import Summands, TruncatedSVD, private_generator, truncated_svd

SCALES = ("stable", "unit", "gd", "weightS")
CORDA_DAMPING = 0.01
"""Of the mean eigenvalue, as in CorDA's code and PEFT, which double it where an inverse fails."""


class Factors(NamedTuple):
    """The start of one adapter: B (m, r), A (r, n), and the decomposition they come from, if any.

    ``svd`` is that of G (the signs of -G are in the factors), of W or of what the method says,
    ``clipped`` what ``clip_to_weight`` multiplied the product by.
    """

    B: Tensor
    A: Tensor
    svd: TruncatedSVD | None = None
    clipped: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """All that an initialiser may look at.

    Attributes:
        m: output features.
        n: input features.
        r: rank of the adapter, at most ``min(m, n)``.
        s: PEFT's ``scaling``, ``alpha/r`` or ``alpha/sqrt(r)``.
        scale: one of ``SCALES``.
        gamma: the official ``init.stable_gamma``.
        seed: with ``name``, the only source of random numbers.
        name: of the layer in the base model.
        W: (m, n) base weight, where the method needs it.
        G: (m, n) mean gradient, formed or not, where the method needs it; or this process's summand
            of it.
        summands: the processes that hold the summands of G; None where G is whole.
        C: (n, n) statistic of the layer's inputs, where the method needs it.
        device: where random factors are placed.
    """

    m: int
    n: int
    r: int
    s: float
    scale: str = "stable"
    gamma: float = 128.0
    seed: int = 0
    name: str = ""
    W: Tensor | None = None
    G: Tensor | OuterProducts | None = None
    summands: Summands | None = None
    C: Tensor | None = None
    device: torch.device | str = "cpu"

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal numbers that depend on seed, name and shape only."""
        generator = private_generator(self.seed, f"{self.name}{shape}")
        return torch.randn(*shape, generator=generator).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform numbers in [-1, 1) that depend on seed, name and shape only."""
        generator = private_generator(self.seed, f"{self.name}{shape}")
        return torch.rand(*shape, generator=generator).mul(2).sub(1).to(self.device)

    def weight_svd(self) -> TruncatedSVD:
        """Return the r leading triplets of W; see ``svd``."""
        return self.svd("weight", self.W, self.r)

    def gradient_svd(self, rank: int) -> TruncatedSVD:
        """Return the leading triplets of G, whole or not; see ``svd``."""
        return self.svd("gradient", self.G, rank, self.summands)

    def svd(
        self,
        what: str,
        matrix: Tensor | OuterProducts,
        rank: int,
        summands: Summands | None = None,
    ) -> TruncatedSVD:
        """Return ``truncated_svd`` of what belongs to the layer, from the layer's random numbers.

        Raises:
            NonFiniteError: for an entry that is not finite, naming the layer.
        """
        generator = private_generator(self.seed, f"{self.name}/svd")
        try:
            return truncated_svd(matrix, rank, generator=generator, summands=summands)
        except FloatingPointError:
            raise not_finite(self.name, what) from None


def size_factors(layer: Layer) -> tuple[float, float, float]:
    """Return the multiplier of both factors, then m̂ and n̂, for ``layer.scale``.

    m̂ = m^(1/4) and n̂ = n^(1/4) belong to ``stable`` and are 1 for the other scales.
    """
    if layer.scale == "stable":
        return 1 / math.sqrt(layer.gamma), layer.m**0.25, layer.n**0.25
    if layer.scale == "unit":
        return 1.0, 1.0, 1.0
    if layer.scale == "gd":
        return 1 / layer.s, 1.0, 1.0
    S = layer.weight_svd().S
    return float((S / layer.s).sqrt().mean()), 1.0, 1.0


def lora(layer: Layer) -> Factors:
    """``B = 0``, ``A`` Kaiming uniform with a = sqrt(5): entries in ±1/sqrt(n).

    Source: PEFT ``reset_lora_parameters``, the original LoRA code (Hu et al. 2021).
    """
    A = layer.uniform(layer.r, layer.n) / math.sqrt(layer.n)
    return Factors(torch.zeros(layer.m, layer.r, device=layer.device), A)


def gaussian(layer: Layer) -> Factors:
    """``B ~ N(0, 1/m)``, ``A ~ N(0, 1/n)``, times ``scale`` with m̂ for B and n̂ for A.

    Source: LoRA-GA's published code, mode «simple», its «unit» normal. Both factors differ from
    zero, so the base weight is offset and the start leaves the outputs unchanged.
    """
    c, m_hat, n_hat = size_factors(layer)
    B = layer.normal(layer.m, layer.r) / math.sqrt(layer.m)
    A = layer.normal(layer.r, layer.n) / math.sqrt(layer.n)
    return Factors(B * (c * m_hat), A * (c * n_hat))


def kaiming(layer: Layer) -> Factors:
    """``B ~ N(0, 2/r)``, ``A`` uniform in ±1/sqrt(n), times ``scale`` with m̂ for B, n̂ for A.

    Source: LoRA-GA's published code, mode «simple»: ``kaiming_normal_`` of B and
    ``kaiming_uniform_(a=sqrt(5))`` of A, both by fan-in. The base weight is offset.
    """
    c, m_hat, n_hat = size_factors(layer)
    B = layer.normal(layer.m, layer.r) * math.sqrt(2 / layer.r)
    A = layer.uniform(layer.r, layer.n) / math.sqrt(layer.n)
    return Factors(B * (c * m_hat), A * (c * n_hat))


def orthogonal(layer: Layer) -> Factors:
    """``Bᵀ B = I`` and ``A Aᵀ = I``, uniformly random, times ``scale`` with m̂ for B, n̂ for A.

    Source: LoRA-GA's published code, mode «simple», ``torch.nn.init.orthogonal_``. The base
    weight is offset. (PEFT's ``init_lora_weights="orthogonal"`` is another method.)
    """
    c, m_hat, n_hat = size_factors(layer)
    B = _haar(layer.normal(layer.m, layer.r))
    A = _haar(layer.normal(layer.n, layer.r)).mT
    return Factors(B * (c * m_hat), A * (c * n_hat))


def pissa(layer: Layer) -> Factors:
    """``B = U_r sqrt(S_r / s)``, ``A = sqrt(S_r / s) V_rᵀ`` of ``W = U S Vᵀ``.

    Source: PiSSA (Meng et al. 2024), as in PEFT. The base weight becomes the residual
    ``W - s B A``, whose spectral norm is σ_{r+1}(W). ``scale`` has no effect.
    """
    svd = layer.weight_svd()
    root = (svd.S / layer.s).sqrt()
    return Factors(svd.U * root, root[:, None] * svd.Vh, svd)


def olora(layer: Layer) -> Factors:
    """``B = Q[:, :r]``, ``A = R[:r]`` of ``W = Q R``.

    Source: OLoRA (Büyükakyüz 2024), as in PEFT: the base weight becomes ``W - s B A``. ``scale``
    has no effect.
    """
    Q, R = torch.linalg.qr(layer.W.to(torch.promote_types(layer.W.dtype, torch.float32)))
    if not torch.isfinite(R).all():
        raise not_finite(layer.name, "weight")
    return Factors(Q[:, : layer.r], R[: layer.r])


def eva(layer: Layer) -> Factors:
    """``B = 0``, ``A = V_rᵀ``, the leading eigenvectors of the inputs' covariance ``C = V S² Vᵀ``.

    Source: EVA (Paischer et al. 2024), as in PEFT with ``rho=1``: all layers keep their rank. A
    projects on the directions in which the layer's inputs at supervised tokens vary most; ``svd``
    is that of the centred inputs over the root of their number, and its captured energy EVA's
    explained variance. ``scale`` has no effect.
    """
    svd = layer.svd("inputs", layer.C, layer.r)
    svd = svd._replace(
        S=svd.S.sqrt(),
        next_value=math.sqrt(svd.next_value),
        norm=math.sqrt(float(layer.C.trace())),
    )
    return Factors(torch.zeros(layer.m, layer.r, device=layer.device), svd.Vh, svd)


def corda(layer: Layer) -> Factors:
    """``B = U_r sqrt(S_r / s)``, ``A = sqrt(S_r / s) V_rᵀ C⁻¹`` of ``W C = U S Vᵀ``.

    Source: CorDA (Yang et al. 2024), instruction-previewed mode, as in PEFT: C is the inputs'
    second moment plus a hundredth of its mean eigenvalue, and the base weight becomes
    ``W - s B A``. No inverse is taken, because ``S Vᵀ C⁻¹ = Uᵀ W``. ``scale`` has no effect.
    """
    dtype = torch.promote_types(layer.W.dtype, torch.float32)
    W, C = layer.W.to(dtype), layer.C.to(dtype)
    eye = torch.eye(layer.n, dtype=dtype, device=C.device)
    WC = W @ (C + CORDA_DAMPING * C.diagonal().mean() * eye)
    svd = layer.svd("weight", WC, layer.r)
    root = (svd.S / layer.s).sqrt()
    # A direction of no size gets no start: 0 instead of 0 / 0.
    A = torch.where(root > 0, 1 / (layer.s * root), 0.0)[:, None] * (svd.U.mT @ W)
    return Factors(svd.U * root, A, svd._replace(norm=float(WC.norm())))


def lora_ga(layer: Layer) -> Factors:
    """``B = U[:, r:2r]``, ``A = V[:, :r]ᵀ`` of ``-G = U S Vᵀ``, times ``scale`` with m̂ for both.

    Source: LoRA-GA (Wang et al. 2024), direction «ArB2r» of the published code. The base weight
    becomes ``W - s B A``. PEFT's ``lora_ga`` also multiplies B by the singular values; the paper
    does not, nor do we.
    """
    c, m_hat, _ = size_factors(layer)
    r = layer.r
    svd = layer.gradient_svd(2 * r)
    return Factors(-svd.U[:, r:] * (c * m_hat), svd.Vh[:r] * (c * m_hat), svd)


def lora_one(layer: Layer) -> Factors:
    """``B = U_r sqrt(S_r/S_0)``, ``A = sqrt(S_r/S_0) V_rᵀ`` of ``-G = U S Vᵀ``, times ``scale``.

    Source: LoRA-One (Zhang et al. 2025), algorithm 1 (its README prints S without the root).
    With ``stable``, ``s B A`` is ``s / (gamma S_0)`` times the best rank-r part of -G: one
    low-rank step of full gradient descent. The base weight stays W.
    """
    c, _, _ = size_factors(layer)
    svd = layer.gradient_svd(layer.r)
    root = (svd.S / svd.S[0]).sqrt() * c
    return Factors(-svd.U * root, root[:, None] * svd.Vh, svd)


def clip_to_weight(factors: Factors, W: Tensor, s: float) -> Factors:
    """Shrink B and A until ``max|s B A| <= max|W|``.

    Source: ``norm_clip`` of LoRA-GA's published code: with ``ρ = max|W| / max|s B A| < 1`` both
    factors are multiplied by sqrt(ρ); otherwise they stay, also where both are zero.
    """
    largest = (s * (factors.B @ factors.A)).abs().amax()
    if largest == 0:
        return factors
    ratio = (W.abs().amax() / largest).clamp(max=1)
    root = ratio.sqrt()
    return factors._replace(B=factors.B * root, A=factors.A * root, clipped=float(ratio))


def _haar(gaussian_matrix: Tensor) -> Tensor:
    """Return Q of the QR decomposition whose R has a positive diagonal: uniformly distributed."""
    Q, R = torch.linalg.qr(gaussian_matrix)
    return Q * R.diagonal().sign()
