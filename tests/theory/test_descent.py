"""Starts and descents do what eqs. 4 and 9 and Spectral-init say, with the library's parts."""

import pytest
import torch

from lora_one.layers import adapted_layers
from lora_one.optimizers import create_preconditioned_optimizer
from lora_one.theory.alignment import misalignment
from lora_one.theory.conditioning import linear_layer_model
from lora_one.theory.descent import descend, relative_error, steps_until
from lora_one.theory.problems import linear_problem, negative_gradient, spectrum
from lora_one.theory.starts import (
    Start,
    gaussian_start,
    library_start,
    spectral_start,
    unstack,
)


@pytest.fixture
def problem():
    return linear_problem(12, 9, spectrum(4, 5.0), samples=60, seed=2)


def gradient_svd(problem):
    return torch.linalg.svd(negative_gradient(problem), full_matrices=False)


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_spectral_start_is_gamma_times_the_best_rank_r_part(problem, rank, gamma):
    start = spectral_start(problem, rank, gamma)
    U, S, Vh = gradient_svd(problem)
    best = gamma * (U[:, :rank] * S[:rank]) @ Vh[:rank]
    torch.testing.assert_close(start.A @ start.B, best, rtol=0, atol=1e-13)
    torch.testing.assert_close(start.A.T @ start.A, start.B @ start.B.T, rtol=0, atol=1e-13)
    assert not start.offset


def test_lora_ga_takes_the_next_right_directions(problem):
    start = library_start(problem, "lora_ga", 2)
    U, _, Vh = gradient_svd(problem)
    assert misalignment(start.A, U[:, :2]) < 1e-12
    assert misalignment(start.B.T, Vh[2:4].T) < 1e-12


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_ga"])
def test_other_starts_leave_the_loss_as_it_is(problem, method):
    start = library_start(problem, method, 3)
    trace = descend(problem, start, 0.1, 0)
    assert torch.equal(trace["loss"][0], problem.loss_and_gradient(torch.zeros(12, 9))[0])


@pytest.mark.parametrize("damping", [0.0, 0.03])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_descent_is_sgd_on_peft_with_the_librarys_optimizer(problem, preconditioned, damping):
    start = spectral_start(problem, 3)
    trace = descend(problem, start, 0.2, 5, preconditioned=preconditioned, damping=damping)
    model = linear_layer_model(problem, start)
    optimizer = create_preconditioned_optimizer(
        model, torch.optim.SGD, lr=0.2, reg=damping, preconditioned=preconditioned
    )
    layer = adapted_layers(model)[0]
    # Rows whose covariance is Σ turn the model's own output into the problem's loss.
    X = torch.linalg.cholesky(problem.Sigma).T
    for _ in range(5):
        optimizer.zero_grad()
        output, target = model(X), X @ problem.Delta + X @ model.base_model.model[0].weight.T
        ((output - target).square().sum() / 2).backward()
        optimizer.step()
    # Five steps of the same arithmetic in another order.
    torch.testing.assert_close(layer.A.detach().T, trace.A, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(layer.B.detach().T, trace.B, rtol=1e-10, atol=1e-11)


def test_a_batch_of_problems_and_rates_is_each_of_them():
    values = torch.stack([spectrum(3, 1.0), spectrum(3, 10.0)])
    batch = linear_problem(8, 7, values, samples=30, seed=0)
    start, rates = spectral_start(batch, 3), torch.tensor([0.1, 0.3])
    together = descend(batch, start, rates[:, None], 6)
    for i, one in enumerate(unstack(batch)):
        for j, rate in enumerate((0.1, 0.3)):
            alone = descend(one, Start(start.A[i], start.B[i]), rate, 6)
            torch.testing.assert_close(together["loss"][:, j, i], alone["loss"])


def test_steps_are_counted_to_the_first_that_is_close_enough(problem):
    start = spectral_start(problem, 4)
    steps = int(steps_until(problem, start, 0.5, tolerance=1e-3, limit=2000))
    measures = {"error": lambda A, B, P: relative_error(problem, P)}
    errors = descend(problem, start, 0.5, steps, measures=measures)["error"]
    assert errors[-1] <= 1e-3 < errors[-2]
    assert steps_until(problem, start, 0.5, tolerance=1e-3, limit=steps - 1).isinf()


def test_a_descent_that_diverges_never_arrives(problem):
    start = spectral_start(problem, 4)
    assert steps_until(problem, start, 1e3, tolerance=1e-6, limit=5000).isinf()


def test_offset_is_taken_from_the_shift_all_the_way(problem):
    start = gaussian_start(problem, 3, 0.5, seed=0)
    start = Start(start.A, torch.ones_like(start.B), offset=True)
    trace = descend(problem, start, 0.1, 3, measures={"P": lambda A, B, P: P})
    expected = trace.A @ trace.B - start.A @ start.B
    torch.testing.assert_close(trace["P"][-1], expected, rtol=0, atol=1e-14)
