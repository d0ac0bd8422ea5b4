"""Gradient descent on (A, B), plain and preconditioned, for batches of problems and rates."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_one.numerics.preconditioner import precondition
from lora_one.theory.problems import Problem
from lora_one.theory.starts import Start

BLOCK = 64
"""Steps between two looks at whether all descents of a batch have arrived."""
DIVERGED = 1e6
"""Relative error from which a descent is given up."""

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Trace:
    """What a descent left.

    Attributes:
        A: (..., d, r) after the last step.
        B: (..., r, k) after the last step.
        steps: at which measures were taken; the start is step 0.
        values: name -> (len(steps), ...).
    """

    A: Tensor
    B: Tensor
    steps: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


def descend(
    problem: Problem,
    start: Start,
    rate: Tensor | float,
    steps: int,
    *,
    preconditioned: bool = False,
    damping: float = 0.0,
    measures: dict[str, Measure] | None = None,
    every: int = 1,
) -> Trace:
    """Run ``A <- A - η ∇_A``, ``B <- B - η ∇_B`` (LoRA-One, eq. 4), or the preconditioned form.

    With ``∇ = ∇L(W + P)`` and ``P = A B``, less the start's product if it is offset:
    ``∇_A = ∇ Bᵀ`` and ``∇_B = Aᵀ ∇``. Preconditioned (eq. 9, with a damping d):
    ``∇_A (B Bᵀ + d I)⁻¹`` and ``(Aᵀ A + d I)⁻¹ ∇_B``. Both factors use the factors before the step.

    Args:
        problem: one, or a batch in leading dimensions.
        start: leading dimensions broadcast against those of ``rate`` and of the problem.
        rate: η, a number or (...).
        steps: how many.
        preconditioned: whether to use eq. 9.
        damping: d.
        measures: name -> function of (A, B, P), taken every ``every`` steps and after the last
            one; ``loss`` is always measured.
        every: see ``measures``.
    """
    eta = torch.as_tensor(rate, dtype=torch.float64)
    batch = torch.broadcast_shapes(eta.shape, start.A.shape[:-2], problem.Delta.shape[:-2])
    eta = eta[..., None, None]
    A = start.A.expand(*batch, *start.A.shape[-2:]).clone()
    B = start.B.expand(*batch, *start.B.shape[-2:]).clone()
    offset = A @ B if start.offset else 0.0
    taken, values = [], {name: [] for name in ("loss", *(measures or {}))}
    for step in range(steps + 1):
        P = A @ B - offset
        loss, gradient = problem.loss_and_gradient(P)
        if step % every == 0 or step == steps:
            taken.append(step)
            values["loss"].append(loss)
            for name, measure in (measures or {}).items():
                values[name].append(measure(A, B, P))
        if step == steps:
            break
        grad_A, grad_B = gradient @ B.mT, A.mT @ gradient
        if preconditioned:
            # ``precondition`` calls the left factor B and the right one A, as PEFT does.
            grad_B, grad_A = precondition(B, A, grad_B, grad_A, damping)
        A, B = A - eta * grad_A, B - eta * grad_B
    stacked = {name: torch.stack(list(series)) for name, series in values.items()}
    return Trace(A, B, torch.tensor(taken), stacked)


def steps_until(
    problem: Problem,
    start: Start,
    rate: Tensor | float,
    *,
    tolerance: float,
    limit: int,
    preconditioned: bool = False,
    damping: float = 0.0,
) -> Tensor:
    """Return after how many steps ``||P - Δ||_F <= tolerance ||Δ||_F`` first holds, inf if never.

    Args:
        problem: as in ``descend``.
        start: as in ``descend``, without an offset.
        rate: as in ``descend``.
        tolerance: relative.
        limit: steps at most.
        preconditioned: as in ``descend``.
        damping: as in ``descend``.
    """
    reached: Tensor | float = torch.inf
    for done in range(0, limit, BLOCK):
        trace = descend(
            problem,
            start,
            rate,
            min(BLOCK, limit - done),
            preconditioned=preconditioned,
            damping=damping,
            measures={"error": lambda A, B, P: relative_error(problem, P)},
        )
        errors = trace["error"]
        close = errors <= tolerance
        first = torch.where(close.any(0), done + close.double().argmax(0), torch.inf)
        reached = first.clamp(max=reached)
        if bool((reached.isfinite() | ~(errors[-1] < DIVERGED)).all()):
            break
        start = Start(trace.A, trace.B)
    return reached


def relative_error(problem: Problem, P: Tensor) -> Tensor:
    """Return ``||P - Δ||_F / ||Δ||_F`` (...)."""
    return (P - problem.Delta).norm(dim=(-2, -1)) / problem.Delta.norm(dim=(-2, -1))
