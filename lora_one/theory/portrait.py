"""The phase portrait of LoRA with two inputs and one output (the setting of LoRA-One's figure 3).

The loss depends on A = (a_1, a_2) and B = b. Coordinates are turned so that the first is the
direction of G; the global minimisers then lie near the hyperbola ``a_1 b = ||Δ||``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_one.theory.descent import descend
from lora_one.theory.problems import LinearProblem, normal, sample_covariance
from lora_one.theory.starts import Start, spectral_start


@dataclass(frozen=True)
class Path:
    """One descent: points (t, 3) of (a_1, a_2, b), loss (t,)."""

    points: Tensor
    loss: Tensor

    def steps_to(self, level: float) -> int | None:
        """Return the first step with a loss of at most ``level``, None if there is none."""
        reached = (self.loss <= level).nonzero()
        return int(reached[0]) if len(reached) else None


@dataclass(frozen=True)
class Portrait:
    """Loss and descent direction on a grid of the plane a_2 = 0, and descents projected onto it.

    Attributes:
        a: (n,) grid of a_1.
        b: (n,) grid of b.
        loss: (n, n), rows along b.
        flow_a: (n, n), ``-∂L/∂a_1``.
        flow_b: (n, n), ``-∂L/∂b``.
        shift: the a_1 b of the minimisers in the plane.
        random: descents from LoRA-init.
        spectral: the descent from Spectral-init.
    """

    a: Tensor
    b: Tensor
    loss: Tensor
    flow_a: Tensor
    flow_b: Tensor
    shift: float
    random: list[Path]
    spectral: Path


def phase_portrait(
    seeds: Sequence[int],
    *,
    alpha: float = 0.7,
    rows: int = 12,
    rate: float = 0.05,
    steps: int = 400,
    extent: float = 2.2,
    grid: int = 160,
) -> Portrait:
    """Return the portrait of one problem and descents from one random start per seed."""
    Delta = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    Sigma = sample_covariance(2, rows, seed=0)
    problem = LinearProblem(torch.zeros_like(Delta), Delta, Sigma)
    line = torch.linspace(-extent, extent, grid, dtype=torch.float64)
    b, a = torch.meshgrid(line, line, indexing="ij")
    P = torch.stack([a * b, torch.zeros_like(a)], -1)[..., None]
    loss, gradient = problem.loss_and_gradient(P)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    starts = [Start(alpha * normal(seed, "A", 2, 1), zero) for seed in seeds]
    spectral = spectral_start(problem, 1)
    if spectral.B < 0:  # singular vectors have a free sign; the hyperbola has two branches
        spectral = Start(-spectral.A, -spectral.B)
    paths = [_path(problem, start, rate, steps) for start in [*starts, spectral]]
    return Portrait(
        a=line,
        b=line,
        loss=loss,
        flow_a=-(gradient[..., 0, 0] * b),
        flow_b=-(gradient[..., 0, 0] * a),
        shift=1.0,
        random=paths[:-1],
        spectral=paths[-1],
    )


def _path(problem: LinearProblem, start: Start, rate: float, steps: int) -> Path:
    point = {"point": lambda A, B, P: torch.cat([A.flatten(), B.flatten()])}
    trace = descend(problem, start, rate, steps, measures=point)
    return Path(trace["point"], trace["loss"])
