"""The two networks of the notebook: digits and a language model, in seconds."""

import pytest
import torch

from lora_one.numerics.svd import truncated_svd
from lora_one.theory.digits import digit_batch, fine_tune, plane_of
from lora_one.theory.language import (
    by_kind,
    follow,
    language_problem,
    one_step_losses,
    outcomes,
    shifted,
)


@pytest.fixture(scope="module")
def problem():
    return language_problem(steps=2, batch_rows=4, large_rows=16, validation_rows=8)


def test_odd_and_even_digits_are_all_there_is():
    even, odd = digit_batch(0), digit_batch(1)
    assert len(even["labels"]) + len(odd["labels"]) == 1797
    assert set(even["labels"].tolist()) == {0, 2, 4, 6, 8}
    assert float(even["pixels"].max()) == 1.0


def test_lora_one_starts_below_lora_and_the_plane_holds_the_loss():
    runs = fine_tune(0, steps=3, rates=(0.05, 0.1))
    assert torch.equal(runs["LoRA"].loss[0], runs["full"].loss[0])  # no shift yet
    assert runs["LoRA-One"].loss[0] < 0.8 * runs["LoRA"].loss[0]
    plane = plane_of(runs, 0, grid=3)
    assert plane.share > 0.8
    assert float(plane.paths["full"][0].abs().max()) < 1e-12
    assert plane.paths["full"].shape == (4, 2)
    assert bool((plane.paths["full"][-1] >= 0).all())


def test_angles_start_at_no_alignment_and_fall_for_b(problem):
    run = follow(problem, "lora", looks=(0, 1))
    kinds = by_kind(run.angles, "B")
    assert set(kinds) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert all(series[0] == 1 and series[1] < 0.98 for series in kinds.values())
    assert run.losses[1] < run.losses[0]


def test_lora_one_is_aligned_with_its_own_gradient(problem):
    run = follow(problem, "lora_one", looks=(0,))
    angles = by_kind(run.angles, "A")
    # Started from 8 rows, compared with 16 that contain them.
    assert all(series[0] < 0.6 for series in angles.values())


def test_one_step_lowers_the_loss_and_leaves_the_model_as_it_was(problem):
    result = one_step_losses(problem, rates=(0.01, 0.1))
    assert result.base == problem.loss(problem.model())
    assert all(min(losses.values()) < result.base for losses in result.losses.values())
    shift = result.best["rank 8"]["model.layers.0.self_attn.q_proj"]
    assert truncated_svd(shift, 9).S[-1] < 1e-5 * truncated_svd(shift, 1).S[0]


def test_a_shift_is_taken_back_even_after_an_error(problem):
    model = problem.model()
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight
    before = weight.detach().clone()
    with pytest.raises(RuntimeError), shifted(model, {name: torch.ones_like(weight)}, 2.0):
        assert torch.allclose(weight, before + 2)
        raise RuntimeError
    assert torch.equal(weight, before)


def test_outcomes_are_those_of_the_base_and_of_each_step(problem):
    step = one_step_losses(problem, rates=(0.1,))
    rows = outcomes(problem, step, {}, 2)
    assert [row["model"] for row in rows] == [
        "base",
        *(f"one step, {label}" for label in step.best),
    ]
    losses = [step.base, *(losses[0.1] for losses in step.losses.values())]
    assert [row["validation loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert rows[0]["test accuracy"] == 0


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="of 'train' asked for"):
        language_problem(steps=10_000)
