"""Fine-tuning problems with a known low-rank shift: LoRA-One, assumptions 2.1 to 2.3."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy
import torch
from torch import Tensor

from lora_one.numerics.svd import private_generator


class Problem(Protocol):
    """A loss of the weight's shift P, which is zero at the pre-trained weight W.

    Attributes:
        W: (d, k) pre-trained weight.
        Delta: (..., d, k) the shift that fits all labels.
    """

    W: Tensor
    Delta: Tensor

    def loss_and_gradient(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss (...) and its gradient (..., d, k) with respect to W, at ``W + P``."""


def negative_gradient(problem: Problem) -> Tensor:
    """Return ``G = -∇L(W)``, the one step of full fine-tuning (LoRA-One, eq. 5)."""
    return -problem.loss_and_gradient(torch.zeros_like(problem.Delta))[1]


def normal(seed: int, name: str, *shape: int) -> Tensor:
    """Return standard normal numbers in fp64 that depend on seed, name and shape only."""
    generator = private_generator(seed, f"{name}{shape}")
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def low_rank_shift(
    d: int, k: int, singular_values: Tensor, seed: int, *, within: int | None = None
) -> Tensor:
    """Return ``U diag(S) Vᵀ`` (..., d, k) with uniformly random orthonormal U and V.

    Args:
        d: rows.
        k: columns.
        singular_values: (..., r*), any order; leading dimensions make a batch with equal U and V.
        seed: of U and V.
        within: the size of the space that U is drawn from, all of R^d by default.
    """
    rank = singular_values.shape[-1]
    U = torch.zeros(d, rank, dtype=torch.float64)
    rows = d if within is None else within
    U[:rows] = torch.linalg.qr(normal(seed, "U", rows, rank)).Q
    V = torch.linalg.qr(normal(seed, "V", k, rank)).Q
    return (U * singular_values[..., None, :]) @ V.T


def spectrum(rank: int, condition: float) -> Tensor:
    """Return ``rank`` singular values in geometric progression from 1 to ``1 / condition``."""
    return torch.logspace(0, -torch.tensor(condition).log10(), rank, dtype=torch.float64)


def sample_covariance(d: int, samples: int, seed: int) -> Tensor:
    """Return ``XᵀX / N`` (d, d) of N standard normal rows, without drawing the rows.

    Bartlett's decomposition: ``XᵀX = RᵀR`` with R upper triangular, standard normal above the
    diagonal and the roots of χ² numbers with N, N - 1, ... degrees of freedom on it. The
    linear model's loss depends on X through this matrix alone, so N costs nothing.

    Raises:
        ValueError: for fewer rows than columns, where the decomposition does not hold.
    """
    if samples < d:
        raise ValueError(f"{samples} rows are fewer than {d} columns.")
    R = normal(seed, "Bartlett", d, d).triu(1)
    squares = numpy.random.default_rng([seed, d]).chisquare(numpy.arange(samples, samples - d, -1))
    R.diagonal().copy_(torch.from_numpy(squares).sqrt())
    return R.T @ R / samples


@dataclass(frozen=True)
class LinearProblem:
    """``L(P) = ||X (W + P) - Y||²_F / 2N`` with ``Y = X (W + Δ)`` (LoRA-One, eq. 2).

    The gradient is ``Σ (P - Δ)`` with ``Σ = XᵀX / N``; W has no effect on it.

    Attributes:
        W: (d, k).
        Delta: (..., d, k); leading dimensions make a batch of problems with equal data.
        Sigma: (d, d).
    """

    W: Tensor
    Delta: Tensor
    Sigma: Tensor

    def loss_and_gradient(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """Return L(P) and ``Σ (P - Δ)``."""
        E = P - self.Delta
        gradient = self.Sigma @ E
        return (E * gradient).sum((-2, -1)) / 2, gradient


def linear_problem(
    d: int,
    k: int,
    singular_values: Tensor,
    *,
    samples: int | None,
    seed: int,
) -> LinearProblem:
    """Return a linear problem with Gaussian inputs and a random shift of these singular values.

    Args:
        d: inputs.
        k: outputs.
        singular_values: (..., r*) of Δ.
        samples: N, at least d; None for infinitely many, ``Σ = I``.
        seed: of W, Δ and the data.
    """
    Sigma = (
        torch.eye(d, dtype=torch.float64)
        if samples is None
        else sample_covariance(d, samples, seed)
    )
    W = normal(seed, "W", d, k) / d**0.5
    return LinearProblem(W, low_rank_shift(d, k, singular_values, seed), Sigma)


@dataclass(frozen=True)
class ReluProblem:
    """``L(P) = ||σ(X (W + P)) - Y||²_F / 2N`` with ``Y = σ(X (W + Δ))``, σ = ReLU.

    The gradient is LoRA-One's ``-J``: ``Xᵀ ((σ(X W_P) - Y) ⊙ σ'(X W_P)) / N`` with
    ``W_P = W + P``.

    Attributes:
        W: (d, k).
        Delta: (d, k).
        X: (N, d).
    """

    W: Tensor
    Delta: Tensor
    X: Tensor

    @cached_property
    def Y(self) -> Tensor:  # noqa: N802 (the paper's name)
        """The labels (N, k)."""
        return (self.X @ (self.W + self.Delta)).relu()

    def loss_and_gradient(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """Return L(P) and its gradient; the ReLU's derivative at 0 counts as 0."""
        H = self.X @ (self.W + P)
        E = H.relu() - self.Y
        loss = E.square().sum((-2, -1)) / (2 * len(self.X))
        return loss, self.X.T @ (E * (H > 0)) / len(self.X)


def relu_problem(
    d: int, k: int, singular_values: Tensor, *, samples: int, signal: float, seed: int
) -> ReluProblem:
    """Return a ReLU problem with Gaussian inputs.

    Args:
        d: inputs.
        k: outputs, each a neuron whose pre-trained weight has norm 1.
        singular_values: (r*,) of Δ before scaling.
        samples: N.
        signal: the largest ``||Δ_m|| / ||w_m||`` over the neurons m: assumption 4.1 wants it
            small, about 1 / (κ r*).
        seed: of W, Δ and the data.
    """
    W = normal(seed, "W", d, k)
    W = W / W.norm(dim=0)
    Delta = low_rank_shift(d, k, singular_values, seed)
    Delta = Delta * (signal / Delta.norm(dim=0).max())
    return ReluProblem(W, Delta, normal(seed, "X", samples, d))


@dataclass(frozen=True)
class TwoLayerProblem:
    """``L(P) = ||σ(X (W + P)) C - Y||²_F / 2N``: a hidden layer that is adapted, a fixed head C.

    Not in the paper's theory: its neurons are outputs themselves (C = I).

    Attributes:
        W: (d, k).
        Delta: (d, k).
        X: (N, d).
        C: (k, c).
    """

    W: Tensor
    Delta: Tensor
    X: Tensor
    C: Tensor

    @cached_property
    def Y(self) -> Tensor:  # noqa: N802 (the paper's name)
        """The labels (N, c)."""
        return (self.X @ (self.W + self.Delta)).relu() @ self.C

    def loss_and_gradient(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """Return L(P) and its gradient."""
        H = self.X @ (self.W + P)
        E = H.relu() @ self.C - self.Y
        loss = E.square().sum((-2, -1)) / (2 * len(self.X))
        return loss, self.X.T @ ((E @ self.C.T) * (H > 0)) / len(self.X)


def two_layer_problem(relu: ReluProblem, heads: int, seed: int) -> TwoLayerProblem:
    """Return the same neurons below a random head with ``heads`` outputs of unit-norm rows."""
    C = normal(seed, "C", relu.W.shape[1], heads) / heads**0.5
    return TwoLayerProblem(relu.W, relu.Delta, relu.X, C)
