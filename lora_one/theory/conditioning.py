"""Experiment 4: what the condition number of Δ costs, with and without the preconditioner."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_one.layers import adapted_layers
from lora_one.optimizers import create_preconditioned_optimizer
from lora_one.theory.descent import descend, relative_error, steps_until
from lora_one.theory.linear import error_of
from lora_one.theory.problems import LinearProblem, linear_problem, spectrum
from lora_one.theory.starts import Start, gaussian_start, spectral_start, unstack

PLAIN_RATES = (0.25, 0.5, 1.0)
PRECONDITIONED_RATES = (0.25, 0.5, 0.9)


def conditioned_problems(
    conditions: Sequence[float],
    *,
    d: int = 24,
    k: int = 16,
    rank: int = 4,
    rows_per_input: int = 50,
    seed: int = 0,
) -> LinearProblem:
    """Return a batch of problems with ``||Δ||_op = 1`` that differ in κ(Δ) alone."""
    values = torch.stack([spectrum(rank, condition) for condition in conditions])
    return linear_problem(d, k, values, samples=rows_per_input * d, seed=seed)


@dataclass(frozen=True)
class Iterations:
    """Steps to the tolerance, by condition number; inf where the limit was not enough.

    Attributes:
        label: which descent.
        conditions: κ.
        steps: (len(conditions), seeds), with the best rate each.
    """

    label: str
    conditions: tuple[float, ...]
    steps: Tensor


def iterations(
    conditions: Sequence[float],
    seeds: Sequence[int],
    *,
    dampings: Sequence[float] = (0.0,),
    rank: int = 4,
    tolerance: float = 1e-6,
    limit: int = 30_000,
    plain: bool = True,
) -> list[Iterations]:
    """Count steps from Spectral-init until ``||A B - Δ||_F <= tolerance ||Δ||_F``.

    Plain gradient descent (LoRA-One, eq. 4) chooses from ``PLAIN_RATES``, the preconditioned one
    (eq. 9), once for every damping, from ``PRECONDITIONED_RATES``.
    """
    variants = [("gradient descent", False, 0.0)] if plain else []
    variants += [(damping_label(damping), True, damping) for damping in dampings]
    results: dict[str, list[Tensor]] = {label: [] for label, *_ in variants}
    for seed in seeds:
        problem = conditioned_problems(conditions, rank=rank, seed=seed)
        start = spectral_start(problem, rank)
        for label, preconditioned, damping in variants:
            rates = torch.tensor(PRECONDITIONED_RATES if preconditioned else PLAIN_RATES)
            steps = steps_until(
                problem,
                start,
                rates[:, None],
                tolerance=tolerance,
                limit=limit,
                preconditioned=preconditioned,
                damping=damping,
            )
            results[label].append(steps.amin(0))
    return [
        Iterations(label, tuple(conditions), torch.stack(series, 1))
        for label, series in results.items()
    ]


def damping_label(damping: float) -> str:
    """Name the preconditioned descent with this damping."""
    return "preconditioned" if damping == 0 else f"preconditioned, damping {damping:g}"


def error_curves(
    conditions: Sequence[float], *, rank: int = 4, steps: int = 400, seed: int = 0
) -> dict[str, Tensor]:
    """Return ``||A B - Δ||_F / ||Δ||_F`` (steps + 1, len(conditions)) of both descents."""
    problem = conditioned_problems(conditions, rank=rank, seed=seed)
    start = spectral_start(problem, rank)
    measures = {"error": error_of(problem)}
    return {
        label: descend(
            problem, start, rate, steps, preconditioned=preconditioned, measures=measures
        )["error"]
        for label, rate, preconditioned in (
            ("gradient descent", 0.5, False),
            ("preconditioned", 0.5, True),
        )
    }


def linear_layer_model(problem: LinearProblem, start: Start) -> PeftModel:
    """Return PEFT's LoRA on one fp64 linear layer with s = 1, started at ``start``."""
    d, k = problem.W.shape
    rank = start.A.shape[-1]
    base = nn.Sequential(nn.Linear(d, k, bias=False, dtype=torch.float64))
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
    layer = adapted_layers(model)[0]
    layer.A.data, layer.B.data = start.A.T.contiguous(), start.B.T.contiguous()
    return model


def adamw(
    problem: LinearProblem,
    start: Start,
    rate: float,
    steps: int,
    *,
    preconditioned: bool,
    damping: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise with the library's (preconditioned) AdamW, the rate decaying linearly to 0.

    Args:
        problem: one problem.
        start: one start without offset.
        rate: the first learning rate.
        steps: how many.
        preconditioned: whether gradients are preconditioned before the moments.
        damping: of the preconditioner.

    Returns:
        A (d, r) and B (r, k) at the end, and the relative error (steps + 1,) along the way.
    """
    model = linear_layer_model(problem, start)
    layer = adapted_layers(model)[0]
    optimizer = create_preconditioned_optimizer(
        model,
        torch.optim.AdamW,
        lr=rate,
        reg=damping,
        preconditioned=preconditioned,
        weight_decay=0.0,
        foreach=False,
    )
    errors = []
    for step in range(steps + 1):
        A, B = layer.A.detach().T, layer.B.detach().T
        errors.append(relative_error(problem, A @ B))
        if step == steps:
            break
        gradient = problem.loss_and_gradient(A @ B)[1]
        layer.A.grad, layer.B.grad = (
            (gradient @ B.T).T.contiguous(),
            (A.T @ gradient).T.contiguous(),
        )
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    return A.clone(), B.clone(), torch.stack(errors)


@dataclass(frozen=True)
class AdamRow:
    """The relative error after a fixed number of AdamW steps, best of the rates.

    Attributes:
        label: ``AdamW`` or ``preconditioned AdamW``.
        start: ``spectral`` or ``random``.
        condition: κ(Δ).
        seed: of problem and start.
        rate: the best first learning rate.
        error: at the end.
    """

    label: str
    start: str
    condition: float
    seed: int
    rate: float
    error: float


def adamw_errors(
    conditions: Sequence[float],
    seeds: Sequence[int],
    *,
    steps: int = 400,
    rates: Sequence[float] = (0.001, 0.004, 0.016, 0.064),
    rank: int = 4,
    alpha: float = 0.1,
) -> list[AdamRow]:
    """Compare AdamW and preconditioned AdamW from spectral and random starts."""
    rows = []
    for seed in seeds:
        batch = conditioned_problems(conditions, rank=rank, seed=seed)
        for condition, problem in zip(conditions, unstack(batch), strict=True):
            starts = {
                "spectral": spectral_start(problem, rank),
                "random": gaussian_start(problem, rank, alpha, seed),
            }
            for name, start in starts.items():
                for label, preconditioned in (("AdamW", False), ("preconditioned AdamW", True)):
                    ends = {
                        rate: float(
                            adamw(problem, start, rate, steps, preconditioned=preconditioned)[2][-1]
                        )
                        for rate in rates
                    }
                    best = min(ends, key=lambda rate: (not ends[rate] < 1e9, ends[rate]))
                    rows.append(AdamRow(label, name, condition, seed, best, ends[best]))
    return rows
