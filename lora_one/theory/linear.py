"""Experiments 1 to 3, the linear model: alignment in time, spectral starts, LoRA-GA's start."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_one.numerics.svd import truncated_svd
from lora_one.theory.alignment import first_crossing, left_space, misalignment
from lora_one.theory.descent import Measure, Trace, descend, relative_error
from lora_one.theory.problems import (
    LinearProblem,
    Problem,
    linear_problem,
    low_rank_shift,
    negative_gradient,
    normal,
    sample_covariance,
    spectrum,
)
from lora_one.theory.starts import Start, gaussian_start, library_start, spectral_start

RATES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Learning rates that every method may choose from, where the shift's norm is 1."""


@dataclass(frozen=True)
class OneStep:
    """The one-step gradient ``G = U S Vᵀ`` cut to rank r*: U (d, r*), S (r*,), V (k, r*)."""

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def condition(self) -> float:
        """κ♮, the condition number of G on its r* directions."""
        return float(self.S[0] / self.S[-1])


def one_step(problem: Problem, rank: int) -> OneStep:
    """Return the leading triplets of G."""
    svd = truncated_svd(negative_gradient(problem), rank)
    return OneStep(svd.U, svd.S, svd.Vh.mT)


def angle_measures(target: OneStep) -> dict[str, Measure]:
    """Return measures ``angle_A`` and ``angle_B``: sines of the largest angles to U and V of G.

    Of A and B the r* leading directions count, as in LoRA-One's theorems 3.1 and 3.2. A zero
    matrix has no directions; its angle is reported as 1.
    """
    rank = len(target.S)

    def angle(M: Tensor, space: Tensor) -> Tensor:
        sine = misalignment(left_space(M, rank), space) if M.any() else 1.0
        return torch.tensor(sine, dtype=torch.float64)

    return {
        "angle_A": lambda A, B, P: angle(A, target.U),
        "angle_B": lambda A, B, P: angle(B.mT, target.V),
    }


def size_of_theorem(target: OneStep, d: int, theta: float) -> float:
    """Return theorem 3.2's α without its constant.

    ``α = θ^(3κ/2) d^(-3κ/4 - 1/2) ||G||_op^(1/2)``.
    """
    kappa = target.condition
    return theta ** (1.5 * kappa) * d ** (-0.75 * kappa - 0.5) * math.sqrt(float(target.S[0]))


@dataclass(frozen=True)
class AlignmentTime:
    """One descent's t*.

    Attributes:
        d: inputs.
        condition: κ of Δ.
        seed: of everything.
        alpha: size of A at the start.
        steps: t*, the step at which A's angle first has the sine θ, interpolated.
        growth: ``ln(1 + η λ_r*(G))``, by which the slowest direction grows in a step.
    """

    d: int
    condition: float
    seed: int
    alpha: float
    steps: float
    growth: float


def alignment_times(
    dimensions: Sequence[int],
    conditions: Sequence[float],
    seeds: Sequence[int],
    *,
    k: int = 16,
    rank: int = 8,
    true_rank: int = 4,
    rows_per_input: int = 4,
    rate: float = 0.2,
    theta: float = 0.1,
) -> list[AlignmentTime]:
    """Measure when A aligns with G, against d (LoRA-One, theorem 3.2 and eq. 6).

    α follows the theorem, see ``size_of_theorem``.
    """
    results = []
    for d in dimensions:
        for seed in seeds:
            Sigma = sample_covariance(d, rows_per_input * d, seed)
            for condition in conditions:
                Delta = low_rank_shift(d, k, spectrum(true_rank, condition), seed)
                problem = LinearProblem(normal(seed, "W", d, k), Delta, Sigma)
                target = one_step(problem, true_rank)
                growth = math.log1p(rate * float(target.S[-1]))
                alpha = size_of_theorem(target, d, theta)
                # Twice the bound of eq. 6 with the constant 1.
                limit = math.ceil(2 * math.log(math.sqrt(d) / theta) / growth)
                start = gaussian_start(problem, rank, alpha, seed)
                measures = {"angle": angle_measures(target)["angle_A"]}
                trace = descend(problem, start, rate, limit, measures=measures)
                steps = first_crossing(trace.steps, trace["angle"], theta)
                results.append(AlignmentTime(d, condition, seed, alpha, steps, growth))
    return results


def alignment_in_time(
    d: int,
    sizes: Sequence[float],
    seeds: Sequence[int],
    *,
    k: int = 64,
    rank: int = 8,
    true_rank: int = 4,
    condition: float = 1.0,
    rows_per_input: int = 4,
    rate: float = 0.2,
    steps: int = 150,
) -> dict[float, list[Trace]]:
    """Run LoRA from Gaussian A of several sizes α and follow both angles.

    Returns:
        α -> one trace per seed, with ``loss``, ``error``, ``angle_A`` and ``angle_B``.
    """
    runs: dict[float, list[Trace]] = {alpha: [] for alpha in sizes}
    for seed in seeds:
        problem = linear_problem(
            d, k, spectrum(true_rank, condition), samples=rows_per_input * d, seed=seed
        )
        measures = angle_measures(one_step(problem, true_rank)) | {"error": error_of(problem)}
        for alpha in sizes:
            start = gaussian_start(problem, rank, alpha, seed)
            runs[alpha].append(descend(problem, start, rate, steps, measures=measures))
    return runs


def error_of(problem: Problem) -> Measure:
    """Return the measure ``||P - Δ||_F / ||Δ||_F``."""
    return lambda A, B, P: relative_error(problem, P)


@dataclass(frozen=True)
class Tuned:
    """A method's best descent.

    Attributes:
        start: where it began.
        rate: the learning rate with the lowest final loss.
        gamma: LoRA-GA's γ, likewise chosen; None for the other methods.
        trace: of that descent.
    """

    start: Start
    rate: float
    gamma: float | None
    trace: Trace


def tuned(
    problem: Problem,
    starts: Mapping[float | None, Start],
    steps: int,
    *,
    rates: Sequence[float] = RATES,
    every: int = 1,
) -> Tuned:
    """Return the descent with the lowest final loss over all rates and starts.

    Args:
        problem: one problem.
        starts: γ (or None) -> start.
        steps: of each descent.
        rates: learning rates, tried for every start.
        every: how often the loss and the error are measured.
    """
    grid = torch.tensor(rates, dtype=torch.float64)
    best: Tuned | None = None
    for gamma, start in starts.items():
        measures = {"error": error_of(problem)}
        trace = descend(problem, start, grid, steps, measures=measures, every=every)
        final = torch.where(trace["loss"][-1].isfinite(), trace["loss"][-1], torch.inf)
        i = int(final.argmin())
        if best is not None and float(final[i]) >= float(best.trace["loss"][-1]):
            continue
        values = {name: series[:, i] for name, series in trace.values.items()}
        best = Tuned(start, rates[i], gamma, Trace(trace.A[i], trace.B[i], trace.steps, values))
    return best


GAMMAS = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
"""What LoRA-GA's γ is chosen from: its factors have norm ``k^(1/4) / sqrt(γ)``."""


def starts_of(
    problem: Problem, method: str, rank: int, *, alpha: float = 0.0, seed: int = 0
) -> dict[float | None, Start]:
    """Return a method's starts by γ: several for LoRA-GA, else one.

    Args:
        problem: one problem.
        method: ``gaussian`` (LoRA-init of size alpha), ``lora_one`` (Spectral-init with γ = 1),
            ``lora_ga`` or another key of the library's ``METHODS`` that needs no inputs.
        rank: r.
        alpha: for ``gaussian``.
        seed: of random factors.
    """
    if method == "gaussian":
        return {None: gaussian_start(problem, rank, alpha, seed)}
    if method == "lora_one":
        return {None: spectral_start(problem, rank)}
    if method == "lora_ga":
        return {g: library_start(problem, method, rank, gamma=g, seed=seed) for g in GAMMAS}
    return {None: library_start(problem, method, rank, seed=seed)}


def race(
    problem: Problem,
    rank: int,
    steps: int,
    *,
    sizes: Sequence[float],
    seed: int,
) -> dict[str, Tuned]:
    """Run LoRA with several sizes of A, LoRA-GA, PiSSA and LoRA-One on one problem."""
    entries = {f"LoRA, α = {alpha:g}": ("gaussian", alpha) for alpha in sizes}
    entries |= {"PiSSA": ("pissa", 0.0), "LoRA-GA": ("lora_ga", 0.0), "LoRA-One": ("lora_one", 0.0)}
    return {
        label: tuned(problem, starts_of(problem, method, rank, alpha=alpha, seed=seed), steps)
        for label, (method, alpha) in entries.items()
    }


def start_table(problem: Problem, runs: Mapping[str, Tuned], true_rank: int) -> list[dict]:
    """Return, per method, the angles to Δ's spaces and ``||P - Δ||`` at the start.

    The angle of a factor is the one its r* leading directions have to Δ's; 1 where it is zero.
    """
    shift = truncated_svd(problem.Delta, true_rank)
    measures = angle_measures(OneStep(shift.U, shift.S, shift.Vh.mT))
    norm = float(torch.linalg.matrix_norm(problem.Delta, 2))
    rows = []
    for label, run in runs.items():
        A, B, P = run.start.A, run.start.B, run.start.P
        gap = float(torch.linalg.matrix_norm(P - problem.Delta, 2)) / norm
        angles = {name: float(measure(A, B, P)) for name, measure in measures.items()}
        rows.append({"method": label, **angles, "gap": gap, "rate": run.rate, "gamma": run.gamma})
    return rows


def first_step_share(problem: Problem, start: Start) -> float:
    """Return the squared cosine between G and what one small step does to the product.

    To first order in η a step changes ``A B`` by ``-η (A Aᵀ ∇ + ∇ Bᵀ B)``. At an offset start
    ``∇ = -G``; LoRA-GA's claim is that this is the best rank-2r part of G.
    """
    G = negative_gradient(problem)
    gradient = problem.loss_and_gradient(start.P)[1]
    change = -(start.A @ start.A.mT @ gradient + gradient @ start.B.mT @ start.B)
    return squared_cosine(change, G)


def squared_cosine(X: Tensor, Y: Tensor) -> float:
    """Return ``<X, Y>² / (||X||² ||Y||²)``."""
    return float((X * Y).sum() ** 2 / (X.square().sum() * Y.square().sum()))


@dataclass(frozen=True)
class RankRow:
    """How a method fares with rank r.

    Attributes:
        method: ``LoRA``, ``LoRA-GA`` or ``LoRA-One``.
        rank: r.
        seed: of problem and start.
        first_step: LoRA-GA: squared cosine of G and the first step; LoRA-One: of G and the start.
        error: ``||P - Δ||_F / ||Δ||_F`` after training, best rate and γ.
        floor: the smallest such error of any shift of rank r.
        start_angle: the sine of the largest angle between B's and Δ's right directions,
            min(r, r*) of them, at the start.
    """

    method: str
    rank: int
    seed: int
    first_step: float
    error: float
    floor: float
    start_angle: float


def rank_sweep(
    ranks: Sequence[int],
    seeds: Sequence[int],
    *,
    d: int = 64,
    k: int = 48,
    true_rank: int = 6,
    condition: float = 4.0,
    rows_per_input: int = 8,
    alpha: float = 0.01,
    steps: int = 1000,
) -> list[RankRow]:
    """Compare LoRA-GA's and LoRA-One's starts, and where descent from them ends, against r."""
    methods = {"LoRA": "gaussian", "LoRA-GA": "lora_ga", "LoRA-One": "lora_one"}
    rows = []
    for seed in seeds:
        values = spectrum(true_rank, condition)
        problem = linear_problem(d, k, values, samples=rows_per_input * d, seed=seed)
        V = truncated_svd(problem.Delta, true_rank).Vh.mT
        for rank in ranks:
            floor = float(values[rank:].norm() / values.norm())
            common = min(rank, true_rank)
            for label, method in methods.items():
                starts = starts_of(problem, method, rank, alpha=alpha, seed=seed)
                best = tuned(problem, starts, steps, every=steps)
                B = best.start.B
                angle = misalignment(left_space(B.mT, common), V) if B.any() else 1.0
                step = (
                    squared_cosine(best.start.P, negative_gradient(problem))
                    if method == "lora_one"
                    else first_step_share(problem, best.start)
                )
                error = float(best.trace["error"][-1])
                rows.append(RankRow(label, rank, seed, step, error, floor, angle))
    return rows
