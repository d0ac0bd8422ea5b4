"""EVA and CorDA start from what flows into the layers: every token that counts, and no other."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import nn

import lora_one
from lora_one.gradients.inputs import stream_inputs
from lora_one.layers import adapted_layers, base_weight
from lora_one.numerics.angles import principal_angles

from .tiny import MODELS, TARGETS, adapted, batches_for, logits, tiny_gpt2, tiny_llama

STATISTICS = {"eva": "covariance", "corda": "second moment"}


def started(model, batches, method, **options):
    peft_model = adapted(model)
    report = lora_one.initialize(peft_model, batches, method=method, **options)
    return peft_model, report


def factors(peft_model):
    return {x.name: (x.B.detach(), x.A.detach()) for x in adapted_layers(peft_model)}


def seen(model, batch):
    """The inputs (rows, tokens, n) of every layer, in fp64."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(tuple(TARGETS["llama"])):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, output, name=name: found.update({name: args[0].double()})
                )
            )
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def test_eva_projects_on_the_principal_components_of_supervised_inputs():
    model, batch = tiny_llama(), batches_for()[0]
    peft_model, report = started(model, [batch], "eva")
    energies = {layer.name: layer.captured_energy for layer in report.layers}
    counts = (batch["attention_mask"] > 0) & (batch["labels"] != -100)
    inputs = seen(model, batch)
    for name, (B, A) in factors(peft_model).items():
        X = inputs[name][counts]
        _, S, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
        cosines = (A.double() * Vh[:4]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(4).double(), atol=1e-5, rtol=0)
        assert energies[name] == pytest.approx(float((S[:4] ** 2).sum() / (S**2).sum()), rel=1e-4)
        assert not B.any()
    assert report.loss_after == report.loss_before


def test_eva_spans_what_pefts_does():
    model, batch = tiny_llama(), batches_for()[0]
    ours, _ = started(model, [batch], "eva")
    config = LoraConfig(
        r=4,
        target_modules=TARGETS["llama"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )
    theirs = get_peft_model(copy.deepcopy(model), config)
    # Twice the same rows: PEFT wants to see that its components no longer move.
    initialize_lora_eva_weights(theirs, [batch, batch], show_progress_bar=False)
    for name, (_, A) in factors(ours).items():
        their_A = factors(theirs)[name][1]
        # Between batches they keep 4 directions, so that the weaker of those drift.
        assert principal_angles(A[:2].T, their_A[:2].T).max() < 2e-2


def test_corda_starts_with_the_part_of_w_that_the_inputs_excite_most():
    model, batch = tiny_llama(), batches_for()[0]
    weights = {x.name: base_weight(x.module).double() for x in adapted_layers(adapted(model))}
    peft_model, report = started(model, [batch], "corda")
    inputs = seen(model, batch)
    for layer in adapted_layers(peft_model):
        W, C = weights[layer.name], 0.0
        for row, mask in zip(inputs[layer.name], batch["attention_mask"].bool(), strict=True):
            X = row[mask] / row[mask].abs().max()
            C = C + X.T @ X / len(inputs[layer.name])
        C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C)).double()
        U, S, Vh = torch.linalg.svd(W @ C)
        part = (U[:, :4] * S[:4]) @ Vh[:4] @ torch.linalg.inv(C)
        B, A = layer.B.detach().double(), layer.A.detach().double()
        torch.testing.assert_close(layer.s * B @ A, part, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.s * B.T @ B, torch.diag(S[:4]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(base_weight(layer.module).double(), W - part, atol=1e-5, rtol=0)
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_corda_takes_the_part_of_w_that_pefts_does(make):
    model = make()
    batch = {key: value[1:2] for key, value in batches_for()[0].items()}  # a row without padding
    targets = TARGETS["llama" if make is tiny_llama else "gpt2"]
    ours = adapted(model, targets=targets)
    lora_one.initialize(ours, [batch], method="corda")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        init_lora_weights="corda",
        corda_config=CordaConfig(),
    )
    base = copy.deepcopy(model)
    preprocess_corda(base, config, run_model=lambda: base(**batch))
    theirs = factors(get_peft_model(base, config))
    for name, (B, A) in factors(ours).items():
        their_B, their_A = theirs[name]
        # They divide inputs by the largest entry, we by the largest absolute value: C differs by a
        # number, which the product does not depend on.
        torch.testing.assert_close(B @ A, their_B @ their_A, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", STATISTICS)
@pytest.mark.parametrize("kind", MODELS)
def test_neither_padding_nor_how_rows_are_batched_matters(kind, method):
    model = MODELS[kind]()
    batches = batches_for(kind)
    pad = torch.nn.functional.pad
    filled = [
        {
            "input_ids": pad(b["input_ids"], (0, 3), value=7),
            "attention_mask": pad(b["attention_mask"], (0, 3)),
            "labels": pad(b["labels"], (0, 3), value=-100),
        }
        for b in batches
    ]
    rows = [
        {k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["labels"]))
    ]
    found = []
    for these, budget in ((batches, None), (filled, None), (rows, 1)):
        peft_model = adapted(model, targets=TARGETS[kind])
        statistics = {}
        stream_inputs(
            peft_model,
            these,
            adapted_layers(peft_model),
            lambda name, s, into=statistics: into.update({name: s.of_rank(name, 4)}),
            statistic=STATISTICS[method],
            memory_budget=budget,
        )
        found.append(statistics)
    first, *others = found
    for other in others:
        for name, C in first.items():
            assert (other[name] - C).norm() < 1e-5 * C.norm(), name


@pytest.mark.parametrize("method", STATISTICS)
def test_an_encoder_as_long_as_its_decoder_is_told_apart(method):
    batch = batches_for("t5")[0]
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 6), value=-100)
    shorter = {**batch, "labels": batch["labels"][:, :6].contiguous()}
    found = []
    for these in (batch, shorter):
        peft_model = adapted(MODELS["t5"](), targets=TARGETS["t5"])
        lora_one.initialize(peft_model, [these], method=method, measure_loss=False)
        found.append(factors(peft_model))
    for name, (B, A) in found[0].items():
        torch.testing.assert_close(B @ A, found[1][name][0] @ found[1][name][1])
        torch.testing.assert_close(A.T @ A, found[1][name][1].T @ found[1][name][1])


@pytest.mark.parametrize("method", STATISTICS)
def test_no_mask_is_a_mask_of_ones(method):
    batch = batches_for("t5")[0]
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 6), value=-100)
    found = []
    for mask in (None, torch.ones_like(batch["input_ids"])):
        peft_model = adapted(MODELS["t5"](), targets=TARGETS["t5"])
        these = {**batch, "attention_mask": mask}
        lora_one.initialize(peft_model, [these], method=method, measure_loss=False)
        found.append(factors(peft_model))
    for name, pair in found[0].items():
        assert all(map(torch.equal, pair, found[1][name]))


class Packed(nn.Module):
    """Its weight is no parameter, as in GPTQ's and AWQ's layers."""

    def __init__(self, W):
        super().__init__()
        self.out_features, self.in_features = W.shape
        self.register_buffer("packed", W)

    def forward(self, x):
        return x @ self.packed.T


def test_eva_needs_no_parameter_of_a_layer(llama_batches):
    expected, _ = started(tiny_llama(), llama_batches, "eva")
    peft_model = adapted(tiny_llama())
    for layer in adapted_layers(peft_model):
        layer.peft_layer.base_layer = Packed(layer.module.weight.detach())
    lora_one.initialize(peft_model, llama_batches, method="eva")
    for name, (_, A) in factors(peft_model).items():
        torch.testing.assert_close(A, factors(expected)[name][1])


@pytest.mark.parametrize("method", STATISTICS)
def test_the_model_is_left_as_it_was_found(method, llama_batches):
    peft_model = adapted(tiny_llama(attention_dropout=0.5)).train()
    before = copy.deepcopy(peft_model.state_dict())
    state = torch.get_rng_state()

    def explode(name, statistic):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        stream_inputs(
            peft_model,
            llama_batches,
            adapted_layers(peft_model),
            explode,
            statistic=STATISTICS[method],
        )
    assert peft_model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in peft_model.modules())
    assert all(torch.equal(value, before[k]) for k, value in peft_model.state_dict().items())


@pytest.mark.parametrize("method", STATISTICS)
def test_an_exported_start_is_the_start(method, tmp_path, llama_batches):
    peft_model, _ = started(tiny_llama(), llama_batches, method)
    lora_one.export_adapter(peft_model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    torch.testing.assert_close(
        logits(loaded, llama_batches[0]), logits(peft_model, llama_batches[0]), atol=1e-5, rtol=0
    )


def test_what_cannot_be_used_is_refused(llama, llama_batches):
    for method in STATISTICS:
        with pytest.raises(lora_one.InputError, match="pass the init batches"):
            lora_one.initialize(adapted(llama), method=method)
        with pytest.raises(lora_one.InputError, match=r"use lora_one\.initialize"):
            lora_one.initialize_adapters(adapted(llama), {}, method=method)
        with pytest.raises(lora_one.InputError, match="uniform"):
            lora_one.allocate_ranks(llama, llama_batches, rank=4, method=method)
    few = copy.deepcopy(llama_batches[0])
    few["labels"][:, 4:] = -100
    few["labels"][0] = -100
    with pytest.raises(lora_one.InputError, match=r"2 supervised tokens .*lower r"):
        lora_one.initialize(adapted(llama), [few], method="eva")


def test_an_input_that_is_not_finite_is_named(llama_batches):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    for method in STATISTICS:
        with pytest.raises(lora_one.NonFiniteError, match=r"layers\.1\.\S+' is not finite"):
            lora_one.initialize(adapted(model), llama_batches, method=method, measure_loss=False)


def test_a_layer_that_sees_nothing_keeps_pefts_start(llama_batches):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
    _, report = started(model, llama_batches, "corda")
    left = [f"model.layers.0.self_attn.{x}_proj" for x in "qv"]
    assert report.left_to_peft == left
    assert all("no input other than zero" in warning for warning in report.warnings)


@pytest.mark.parametrize("method", STATISTICS)
def test_a_weight_of_zero_and_inputs_that_never_vary_get_finite_factors(method, llama_batches):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.ones_like(model.model.embed_tokens.weight))
    peft_model = adapted(model)
    report = lora_one.initialize(peft_model, llama_batches, method=method)
    assert report.left_to_peft == []
    for B, A in factors(peft_model).values():
        assert torch.isfinite(B).all()
        assert torch.isfinite(A).all()
