"""LoRA-One's statements on models small enough to check in seconds."""

import math

import pytest
import torch

from lora_one.theory.alignment import first_crossing, fit_log, left_space, misalignment
from lora_one.theory.conditioning import adamw_errors, iterations
from lora_one.theory.linear import (
    alignment_in_time,
    alignment_times,
    first_step_share,
    one_step,
    rank_sweep,
    squared_cosine,
    tuned,
)
from lora_one.theory.nonlinear import convergence, sample_sizes
from lora_one.theory.problems import (
    linear_problem,
    negative_gradient,
    relu_problem,
    spectrum,
    two_layer_problem,
)
from lora_one.theory.starts import library_start, spectral_start


@pytest.mark.parametrize("condition", [1.0, 5.0])
def test_theorem_3_1_b_is_aligned_from_the_first_step_on(condition):
    (traces,) = alignment_in_time(64, (0.01,), (0, 1), k=20, condition=condition, steps=60).values()
    for trace in traces:
        assert trace["angle_B"][0] == 1  # B = 0
        # B is at worst as ill-conditioned as (η G)^t on its way: rounding times a few hundred.
        assert trace["angle_B"][1:].max() < 1e-12


def test_theorem_3_2_alignment_time_grows_like_half_ln_d():
    times = alignment_times((32, 64, 128, 256, 512), (1.0,), range(6), rank=16, theta=0.1)
    assert all(math.isfinite(row.steps) for row in times)
    d = torch.tensor([float(row.d) for row in times])
    fit = fit_log(d, torch.tensor([row.steps * row.growth for row in times]))
    assert fit.low < 0.5 < fit.high
    assert fit.low > 0.2  # the interval also excludes «no growth», by far
    # Eq. 6 with a constant of 2: ln(√d / θ) / ln(1 + η λ).
    for row in times:
        assert row.steps * row.growth < 2 * math.log(math.sqrt(row.d) / 0.1)


def test_a_smaller_start_aligns_better():
    runs = alignment_in_time(64, (1e-4, 1e-2, 0.1), (0,), k=20, steps=150)
    best = {size: float(traces[0]["angle_A"].min()) for size, traces in runs.items()}
    assert 5 * best[1e-4] < best[1e-2] < 0.7 * best[0.1]


def test_theorem_3_3_the_spectral_start_is_near_the_shift():
    for seed in range(5):
        problem = linear_problem(20, 15, spectrum(4, 3.0), samples=20 * 400, seed=seed)
        start = spectral_start(problem, 4)
        error = torch.linalg.matrix_norm(start.A @ start.B - problem.Delta, 2)
        # G has rank r*, so A B = G = Σ Δ and the error is that of (Σ - I) Δ.
        epsilon = torch.linalg.matrix_norm(problem.Sigma - torch.eye(20), 2)
        assert error <= epsilon * (1 + 1e-9)
        assert error < (1 / 3) / 2  # half of Δ's smallest singular value


def test_the_spectral_start_is_aligned_before_the_first_step():
    problem = linear_problem(20, 15, spectrum(4, 3.0), samples=200, seed=0)
    start, target = spectral_start(problem, 8), one_step(problem, 4)
    assert misalignment(left_space(start.A, 4), target.U) < 1e-12
    assert misalignment(left_space(start.B.T, 4), target.V) < 1e-12


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lora_ga_first_step_is_the_best_rank_2r_part(rank):
    problem = linear_problem(24, 20, spectrum(6, 4.0), samples=200, seed=0)
    S = torch.linalg.svdvals(negative_gradient(problem)).square()
    share = first_step_share(problem, library_start(problem, "lora_ga", rank))
    assert share == pytest.approx(float(S[: 2 * rank].sum() / S.sum()), rel=1e-10)
    one = spectral_start(problem, rank)
    captured = squared_cosine(one.A @ one.B, negative_gradient(problem))
    assert captured == pytest.approx(float(S[:rank].sum() / S.sum()), rel=1e-10)


def test_lora_ga_stops_short_from_rank_r_on_and_gains_below():
    rows = {
        (row.method, row.rank): row
        for row in rank_sweep((2, 6), (0,), d=32, k=24, true_rank=6, steps=400)
    }
    # At r = r*: B starts outside the space it has to be in, and the offset needs more rank.
    assert rows["LoRA-GA", 6].start_angle > 0.99
    assert rows["LoRA-One", 6].start_angle < 1e-12
    assert rows["LoRA-GA", 6].error > 1e-3
    assert rows["LoRA-One", 6].error < 1e-9
    # Below r*: what was subtracted from W gives a shift of rank 2r.
    assert rows["LoRA-GA", 2].error < rows["LoRA-GA", 2].floor < rows["LoRA-One", 2].error


def test_preconditioned_descent_does_not_see_the_condition_number():
    conditions = (1.0, 10.0, 100.0, 1e4)
    counts = iterations(conditions, (0, 1), limit=2500, dampings=(0.0, 1e-2))
    plain, exact, damped = (row.steps.median(-1).values for row in counts)
    assert exact.max() < 2 * exact.min()
    # The slowest direction shrinks by 1 - η/κ a step: steps in proportion to κ.
    assert 3 < plain[1] / plain[0] < 30
    assert 3 < plain[2] / plain[1] < 30
    assert plain[3].isinf()
    # Damping above the smallest eigenvalue of B Bᵀ, which is 1/κ, brings κ back.
    assert damped[1] < 1.5 * exact[1]
    assert damped[3] > 5 * exact[3]


def test_preconditioned_adamw_stays_exact_where_adamw_does_not():
    rows = adamw_errors((1e4,), (0,), steps=400, rates=(0.004,))
    errors = {row.label: row.error for row in rows if row.start == "spectral"}
    assert errors["preconditioned AdamW"] < 1e-2 * errors["AdamW"]


def test_theorem_4_2_linear_rate_whatever_the_condition_number():
    results = convergence((1.0, 30.0), d=16, k=12, samples=4096, steps=40)
    for result in results:
        error, bound = result.errors["spectral, preconditioned"], result.bound()
        assert bool((error <= bound).all())
    ends = [result.errors["spectral, preconditioned"][-1] for result in results]
    assert max(ends) < 3 * min(ends)
    plain = [result.errors["spectral, plain"][-1] for result in results]
    assert plain[1] > 100 * plain[0]


def test_relu_alignment_improves_with_the_root_of_the_samples():
    rows = sample_sizes((512, 8192), (0.1,), range(3), d=16, k=12)
    errors = {
        (model, N, side): sum(
            getattr(row, side) for row in rows if row.model == model and row.samples == N
        )
        for model in ("ReLU", "two layers")
        for N in (512, 8192)
        for side in ("left", "right")
    }
    # Sixteen times the rows: a quarter of the error, give or take a third.
    for side in ("left", "right"):
        assert 2.7 < errors["ReLU", 512, side] / errors["ReLU", 8192, side] < 6
    # A head C turns the output side, however many rows there are.
    assert errors["two layers", 8192, "right"] > 0.7 * errors["two layers", 512, "right"]


def test_under_a_head_the_gradient_is_a_quarter_of_delta_times_what_the_head_mixes():
    """``G ≈ ¼ Δ (C Cᵀ + diag(C Cᵀ))``: P(two neurons active) ≈ ¼, P(one active) = ½."""
    relu = relu_problem(32, 24, spectrum(3, 1.0), samples=30_000, signal=0.1, seed=0)
    problem = two_layer_problem(relu, 24, seed=0)
    mixed = problem.C @ problem.C.T
    told = problem.Delta @ (mixed + mixed.diagonal().diag()) / 4
    # What is left: neurons are not orthogonal, and (x·w)² is not independent of their activity.
    assert (negative_gradient(problem) - told).norm() < 0.15 * told.norm()


def test_lora_ga_is_left_with_an_error_in_proportion_to_what_it_subtracts():
    problem = linear_problem(24, 16, spectrum(3, 2.0), samples=200, seed=0)
    ends = [
        tuned(problem, {gamma: library_start(problem, "lora_ga", 3, gamma=gamma)}, 400, every=400)
        for gamma in (256.0, 1024.0)
    ]
    first, second = (float(end.trace["error"][-1]) for end in ends)
    assert first / second == pytest.approx(4, rel=0.1)


def test_a_crossing_is_interpolated_in_the_logarithm():
    steps, values = torch.tensor([0, 10]), torch.tensor([1.0, 0.01], dtype=torch.float64)
    assert first_crossing(steps, values, 0.1) == pytest.approx(5)
    assert first_crossing(steps, values, 1.0) == 0
    assert first_crossing(steps, values, 1e-3) == math.inf


def test_fit_recovers_a_line_in_ln_x_and_its_interval_covers_it():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    noise = torch.tensor([0.1, -0.1, 0.05, -0.1, 0.05], dtype=torch.float64)
    fit = fit_log(x, 3 + 2 * x.log() + noise)
    assert fit.low < 2 < fit.high
    assert fit(x)[0] == pytest.approx(fit.intercept)
