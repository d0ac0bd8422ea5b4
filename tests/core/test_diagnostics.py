"""Theorems about the angles to the one-step gradient and about what training has added."""

import math

import pytest
import torch

from lora_one import estimate_gradients, initialize
from lora_one.adapters.write import initial_state
from lora_one.diagnostics import gradient_spaces, measure
from lora_one.layers import adapted_layers
from lora_one.numerics.angles import leading_directions, principal_angles
from lora_one.numerics.update import update_singular_values

from .tiny import adapted, batches_for, known_spectrum, perturb, tiny_llama

RANK = 4
# Promised by the randomised SVD: 5e-4 in sine.
ALIGNED = math.degrees(5e-4)


def factors(m, n, r, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)


def test_leading_directions_are_the_leading_left_singular_vectors():
    X, U, *_ = known_spectrum(50, 6, [3.0, 2.0, 1.0, 0.1, 0.01, 1e-4], dtype=torch.float32)
    for k in (1, 3, 6):
        found = leading_directions(X, k)
        torch.testing.assert_close(found.mT @ found, torch.eye(k), atol=1e-6, rtol=0)
        # fp32 knows X to 1e-7, and the last direction is 1e-4 of it.
        assert float(principal_angles(found.double(), U[:, :k])[-1]) < 2e-3


def test_where_there_are_too_few_directions_there_are_none():
    X, *_ = known_spectrum(50, 3, [3.0, 2.0, 1.0], dtype=torch.float32)
    X = torch.cat([X, X[:, :1] + X[:, 1:2]], dim=1)
    assert leading_directions(X, 3) is not None
    assert leading_directions(X, 4) is None
    assert leading_directions(torch.zeros(50, 3), 1) is None


@pytest.mark.parametrize(("m", "n", "r"), [(40, 30, 4), (30, 40, 1), (6, 40, 4), (5, 5, 5)])
def test_the_spectrum_of_the_update_is_that_of_the_dense_difference(m, n, r):
    (B0, A0), (B, A) = factors(m, n, r, seed=0), factors(m, n, r, seed=1)
    wide = [factor.double() for factor in (B, A, B0, A0)]
    dense = 0.5 * torch.linalg.svdvals(wide[0] @ wide[1] - wide[2] @ wide[3])
    found = update_singular_values(B, A, 0.5, (B0, A0))
    assert len(found) == min(m, n, 2 * r)
    torch.testing.assert_close(found.double(), dense[: len(found)], rtol=1e-5, atol=1e-5)
    alone = 0.5 * torch.linalg.svdvals(wide[0] @ wide[1])
    found = update_singular_values(B, A, 0.5)
    torch.testing.assert_close(found.double(), alone[:r], rtol=1e-5, atol=1e-5)


def test_an_update_that_is_small_beside_the_start_keeps_its_precision():
    B0, A0 = factors(40, 30, 4, seed=0)
    assert not update_singular_values(B0, A0, 2.0, (B0, A0)).any()
    step_B, step_A = factors(40, 30, 4, seed=1)
    B, A = B0 + 1e-5 * step_B, A0 + 1e-5 * step_A
    dense = torch.linalg.svdvals(B.double() @ A.double() - B0.double() @ A0.double())[:8]
    # B A - B0 A0 in fp32 would be off by 1e-6 ‖B0 A0‖ / ‖update‖ = 1e-1.
    found = update_singular_values(B, A, 1.0, (B0, A0)).double()
    torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5 * float(dense[0]))


@pytest.fixture(scope="module")
def base():
    return tiny_llama()


def few_tokens():
    """A row of which ``RANK`` positions carry gradient, so that no layer's G has a higher rank.

    A query has one less: at the first position there is nothing to choose from.
    """
    ids = torch.arange(5, 5 + RANK + 1)[None]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}]


def started(base, method, batches, rank=RANK, **options):
    """A model that starts by a method, and the spaces of the base model's gradient."""
    model = adapted(base, r=rank, **options)
    initialize(model, batches, method=method, seed=3)
    names = [layer.name for layer in adapted_layers(model)]
    return model, gradient_spaces(base, batches, names, rank, seed=3)[0]


def all_measures(model, spaces):
    """Kind of measure -> one value per layer."""
    found = {}
    for layer in adapted_layers(model):
        start = initial_state(model).factors[layer.name]
        for key, value in measure(layer, spaces.get(layer.name), start).items():
            found.setdefault(key.partition("/")[0], []).append(value)
    return found


def test_lora_one_starts_in_the_gradients_spaces(base):
    found = all_measures(*started(base, "lora_one", batches_for()))
    assert max(found["principal_angle_A"]) < ALIGNED
    assert max(found["principal_angle_B"]) < ALIGNED
    assert set(found["update_norm"]) == {0.0}


def test_lora_ga_starts_in_one_of_them_and_beside_the_other(base):
    found = all_measures(*started(base, "lora_ga", batches_for()))
    assert max(found["principal_angle_A"]) < ALIGNED
    assert min(found["principal_angle_B"]) > 90 - ALIGNED  # U[:, r:2r] against U[:, :r]


def test_lora_starts_anywhere_with_a_and_nowhere_with_b(base):
    found = all_measures(*started(base, "lora", batches_for()))
    assert min(found["principal_angle_A"]) > 45
    assert set(found["principal_angle_B"]) == {None}


def test_lora_s_first_step_turns_b_into_the_gradients_space(base):
    """``B_1 = -η s G A_0ᵀ``: its columns span those of a G of rank r. A gets ``s Bᵀ G = 0``."""
    batches = few_tokens()
    targets = ["v_proj", "down_proj"]
    model, spaces = started(base, "lora", batches, targets=targets)
    before = all_measures(model, spaces)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**batches[0]).loss.backward()
    optimizer.step()
    found = all_measures(model, spaces)
    assert max(found["principal_angle_B"]) < 0.1  # fp32, and factors of condition 1e3
    assert found["principal_angle_A"] == before["principal_angle_A"]
    gradients = estimate_gradients(base, batches, target_modules=targets)
    for layer, norm in zip(adapted_layers(model), found["update_norm"], strict=True):
        A = layer.A.detach()
        update = 1e-3 * layer.s**2 * gradients[layer.name] @ A.mT @ A
        assert norm == pytest.approx(float(update.norm()), rel=1e-3)


def test_norm_and_spectrum_are_those_of_the_change_of_the_merged_weight(base):
    model, spaces = started(base, "pissa", batches_for())
    perturb(model)
    found = all_measures(model, spaces)
    for at, layer in enumerate(adapted_layers(model)):
        merged = layer.module.weight + layer.s * layer.B @ layer.A
        change = (merged - base.get_submodule(layer.name).weight).detach()
        assert found["update_norm"][at] == pytest.approx(float(change.norm()), rel=1e-4)
        expected = torch.linalg.svdvals(change)[: 2 * RANK].tolist()
        assert found["update_singular_values"][at] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_gradient_with_fewer_directions_has_no_angles(base):
    model, spaces = started(base, "lora", few_tokens(), rank=2 * RANK)
    assert spaces == {}
    found = all_measures(model, spaces)
    assert set(found["principal_angle_A"]) == {None}
    assert set(found["update_norm"]) == {0.0}


def test_only_the_named_layers_are_decomposed_and_the_model_is_left_alone(base):
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    names = ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    state = torch.get_rng_state()
    spaces, seen = gradient_spaces(base, batches_for(), names, 2)
    assert list(spaces) == names
    assert [tuple(map(tuple, (s.U.shape, s.V.shape))) for s in spaces.values()] == [
        ((32, 2), (32, 2)),
        ((32, 2), (48, 2)),
    ]
    assert seen.tokens > 0
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert gradient_spaces(base, batches_for(), names, 2, keeps=False)[0] == {}
