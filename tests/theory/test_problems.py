"""The problems are what their docstrings say: losses, gradients, data."""

import pytest
import torch

from lora_one.theory.problems import (
    LinearProblem,
    ReluProblem,
    linear_problem,
    low_rank_shift,
    negative_gradient,
    normal,
    relu_problem,
    sample_covariance,
    spectrum,
    two_layer_problem,
)


def linear():
    return linear_problem(10, 7, spectrum(3, 4.0), samples=40, seed=1)


def relu():
    return relu_problem(10, 7, spectrum(3, 4.0), samples=50, signal=0.4, seed=1)


PROBLEMS = {"linear": linear, "relu": relu, "two layers": lambda: two_layer_problem(relu(), 5, 2)}


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_is_that_of_the_loss(name):
    problem = PROBLEMS[name]()
    P = (0.3 * normal(3, "P", 10, 7)).requires_grad_()
    loss, gradient = problem.loss_and_gradient(P)
    loss.backward()
    torch.testing.assert_close(gradient, P.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_shift_fits_all_labels(name):
    problem = PROBLEMS[name]()
    loss, gradient = problem.loss_and_gradient(problem.Delta)
    assert loss < 1e-28  # squares of rounding errors
    assert gradient.abs().max() < 1e-14


def test_linear_loss_is_that_of_rows_with_this_covariance():
    X, problem = normal(0, "X", 40, 10), linear()
    problem = LinearProblem(problem.W, problem.Delta, X.T @ X / 40)
    P = normal(3, "P", 10, 7)
    residual = X @ (problem.W + P) - X @ (problem.W + problem.Delta)
    expected = residual.square().sum() / 80
    torch.testing.assert_close(problem.loss_and_gradient(P)[0], expected, rtol=1e-12, atol=0)


def test_sampled_covariance_has_wishart_moments():
    d, N, count = 6, 9, 4000
    draws = torch.stack([sample_covariance(d, N, seed) for seed in range(count)])
    # Entries of XᵀX / N: mean δ_ij and variance (1 + δ_ij) / N; five standard errors.
    variance = (1 + torch.eye(d, dtype=torch.float64)) / N
    error = (draws.mean(0) - torch.eye(d)).abs()
    assert bool((error < 5 * (variance / count).sqrt()).all())
    # A variance's standard error is at most √(κ / count) times itself; Wishart kurtosis κ < 4.
    assert bool(((draws.var(0) / variance - 1).abs() < 5 * (4 / count) ** 0.5).all())


def test_covariance_needs_as_many_rows_as_inputs():
    with pytest.raises(ValueError, match="3 rows are fewer than 4 columns"):
        sample_covariance(4, 3, 0)


def test_infinitely_many_rows_give_the_shift_itself():
    problem = linear_problem(8, 6, spectrum(2, 2.0), samples=None, seed=0)
    assert torch.equal(negative_gradient(problem), problem.Delta)


def test_shift_has_the_singular_values_asked_for():
    values = torch.stack([spectrum(3, 1.0), spectrum(3, 100.0)])
    found = torch.linalg.svdvals(low_rank_shift(9, 8, values, seed=0))[:, :3]
    torch.testing.assert_close(found, values, rtol=1e-10, atol=0)
    assert values[1].tolist() == pytest.approx([1.0, 0.1, 0.01])


def test_relu_signal_is_the_largest_relative_shift_of_a_neuron():
    problem = relu()
    ratio = problem.Delta.norm(dim=0) / problem.W.norm(dim=0)
    assert float(ratio.max()) == pytest.approx(0.4)


def test_numbers_depend_on_seed_and_name_only():
    assert torch.equal(normal(1, "X", 3, 2), normal(1, "X", 3, 2))
    assert not torch.equal(normal(1, "X", 3, 2), normal(2, "X", 3, 2))
    assert not torch.equal(normal(1, "X", 3, 2), normal(1, "W", 3, 2))
    assert isinstance(relu(), ReluProblem)
