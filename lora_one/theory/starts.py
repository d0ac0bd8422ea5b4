"""Starts of (A, B) for a problem, taken from the library's initialisers."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_one.numerics.factors import Layer
from lora_one.numerics.methods import METHODS
from lora_one.theory.problems import Problem, negative_gradient, normal


class Start(NamedTuple):
    """A (..., d, r), B (..., r, k), and whether ``A B`` is taken from W at the start."""

    A: Tensor
    B: Tensor
    offset: bool = False

    @property
    def P(self) -> Tensor:  # noqa: N802 (the shift of the weight, as in ``Problem``)
        """The shift of the weight at the start: 0 with an offset."""
        product = self.A @ self.B
        return product - product if self.offset else product


def gaussian_start(problem: Problem, rank: int, alpha: float, seed: int) -> Start:
    """``[A]_ij ~ N(0, α²)``, ``B = 0`` (LoRA-One's LoRA-init)."""
    *batch, d, k = problem.Delta.shape
    A = alpha * normal(seed, "A", d, rank)
    zeros = torch.zeros(*batch, rank, k, dtype=torch.float64)
    return Start(A.expand(*batch, d, rank), zeros)


def library_start(
    problem: Problem, method: str, rank: int, *, gamma: float = 1.0, seed: int = 0
) -> Start:
    """Start with ``lora_one.numerics.factors``, scale «stable» and s = 1.

    The library's weight is (out, in) = Wᵀ and its G the gradient, not its negative.

    Args:
        problem: one problem, not a batch.
        method: a key of ``METHODS`` that needs no inputs.
        rank: r.
        gamma: the library's ``stable_gamma``.
        seed: of random factors.
    """
    d, k = problem.W.shape
    spec = METHODS[method]
    gradient = -negative_gradient(problem).T if spec.needs == "gradient" else None
    layer = Layer(m=k, n=d, r=rank, s=1.0, gamma=gamma, seed=seed, W=problem.W.T, G=gradient)
    factors = spec.function(layer)
    return Start(factors.A.T.double(), factors.B.T.double(), spec.offset)


def spectral_start(problem: Problem, rank: int, gamma: float = 1.0) -> Start:
    """``A = sqrt(γ) U_r S_r^½``, ``B = sqrt(γ) S_r^½ V_rᵀ`` of ``G = U S Vᵀ`` (Spectral-init).

    Hence ``A B = γ P_r(G)``. Algorithm 1 divides S by S_0, which the library's LoRA-One follows;
    with ``stable_gamma = 1 / (γ S_0)`` that division cancels.

    Args:
        problem: one problem or a batch.
        rank: r.
        gamma: the paper's γ: 1 for linear models, 2 for ReLU (theorem 4.2).
    """
    if problem.Delta.ndim == 2:
        S_0 = float(torch.linalg.matrix_norm(negative_gradient(problem), 2))
        return library_start(problem, "lora_one", rank, gamma=1 / (gamma * S_0))
    starts = [spectral_start(one, rank, gamma) for one in unstack(problem)]
    return Start(torch.stack([s.A for s in starts]), torch.stack([s.B for s in starts]))


def unstack(problem: Problem) -> list[Problem]:
    """Return the problems of a batch of shifts."""
    return [type(problem)(**{**problem.__dict__, "Delta": Delta}) for Delta in problem.Delta]
