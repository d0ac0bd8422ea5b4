"""Experiment 5: the ReLU model of LoRA-One's section 4, and a two-layer network."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_one.numerics.svd import truncated_svd
from lora_one.theory.alignment import misalignment
from lora_one.theory.descent import descend
from lora_one.theory.linear import error_of, one_step
from lora_one.theory.problems import (
    Problem,
    relu_problem,
    spectrum,
    two_layer_problem,
)
from lora_one.theory.starts import gaussian_start, spectral_start


@dataclass(frozen=True)
class Convergence:
    """Errors ``||A B - Δ||_F / ||Δ||_F`` by step.

    Attributes:
        condition: κ(Δ).
        rate: η of the preconditioned descents.
        errors: label -> (steps + 1,).
    """

    condition: float
    rate: float
    errors: dict[str, Tensor]

    def bound(self) -> Tensor:
        """Return theorem 4.2's ``(1 - η/4)^t`` from where the preconditioned descent starts."""
        error = self.errors["spectral, preconditioned"]
        return error[0] * (1 - self.rate / 4) ** torch.arange(len(error), dtype=torch.float64)


def convergence(
    conditions: Sequence[float],
    *,
    d: int = 32,
    k: int = 24,
    rank: int = 3,
    samples: int = 8192,
    signal: float = 0.3,
    alpha: float = 0.01,
    rate: float = 0.5,
    plain_rates: Sequence[float] = (1.0, 2.0, 4.0),
    steps: int = 80,
    seed: int = 0,
) -> list[Convergence]:
    """Run the ReLU model from LoRA-init and from Spectral-init with γ = 2.

    Plain descents use the rate of ``plain_rates / ||Δ||_op`` with the lowest final loss, since the
    curvature along A and B is that of ``||Δ||_op``; the preconditioned one has η = ``rate``.
    """
    results = []
    for condition in conditions:
        problem = relu_problem(
            d, k, spectrum(rank, condition), samples=samples, signal=signal, seed=seed
        )
        norm = torch.linalg.matrix_norm(problem.Delta, 2)
        measures = {"error": error_of(problem)}
        errors = {}
        for label, start in (
            ("random, plain", gaussian_start(problem, rank, alpha, seed)),
            ("spectral, plain", spectral_start(problem, rank, gamma=2.0)),
        ):
            traces = [
                descend(problem, start, float(r / norm), steps, measures=measures)
                for r in plain_rates
            ]
            best = min(traces, key=lambda trace: float(trace["loss"][-1].nan_to_num(torch.inf)))
            errors[label] = best["error"]
        errors["spectral, preconditioned"] = descend(
            problem,
            spectral_start(problem, rank, gamma=2.0),
            rate,
            steps,
            preconditioned=True,
            measures=measures,
        )["error"]
        results.append(Convergence(condition, rate, errors))
    return results


@dataclass(frozen=True)
class SampleRow:
    """How well the one-step gradient of N rows knows Δ.

    Attributes:
        model: ``ReLU`` or ``two layers``.
        signal: largest ``||Δ_m|| / ||w_m||``.
        samples: N.
        seed: of the problem.
        left: sine of the largest angle between U_r*(G) and U_r*(Δ).
        right: the same for V.
        gap: ``min_c ||c P_r*(G) - Δ||_F / ||Δ||_F``: the start's error with the best γ.
    """

    model: str
    signal: float
    samples: int
    seed: int
    left: float
    right: float
    gap: float


def sample_sizes(
    samples: Sequence[int],
    signals: Sequence[float],
    seeds: Sequence[int],
    *,
    d: int = 32,
    k: int = 24,
    rank: int = 3,
    heads: int = 24,
) -> list[SampleRow]:
    """Measure the alignment of G with Δ against N, for the ReLU and the two-layer model."""
    rows = []
    for seed in seeds:
        for signal in signals:
            whole = relu_problem(
                d, k, spectrum(rank, 1.0), samples=max(samples), signal=signal, seed=seed
            )
            for N in samples:
                relu = type(whole)(whole.W, whole.Delta, whole.X[:N])
                models: dict[str, Problem] = {
                    "ReLU": relu,
                    "two layers": two_layer_problem(relu, heads, seed),
                }
                for name, problem in models.items():
                    rows.append(SampleRow(name, signal, N, seed, *_gaps(problem, rank)))
    return rows


def _gaps(problem: Problem, rank: int) -> tuple[float, float, float]:
    step, shift = one_step(problem, rank), truncated_svd(problem.Delta, rank)
    M = (step.U * step.S) @ step.V.T
    scale = (M * problem.Delta).sum() / M.square().sum()
    gap = (scale * M - problem.Delta).norm() / problem.Delta.norm()
    return misalignment(step.U, shift.U), misalignment(step.V, shift.Vh.mT), float(gap)
