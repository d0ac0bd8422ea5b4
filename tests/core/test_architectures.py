"""Architectures that differ from a decoder of text in what the gradient relies on."""

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import lora_one

from .test_gradients import Shared, assert_equal
from .tiny import SIZES, adapted, batches_for, tiny_llama

ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}


def test_reentrant_checkpointing_reaches_blocks_without_embeddings():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**ENCODER, image_size=16, patch_size=8, num_labels=3)
    model = transformers.ViTForImageClassification(config).double()
    batches = [{"pixel_values": torch.randn(2, 3, 16, 16).double(), "labels": torch.tensor([0, 2])}]
    exact = lora_one.estimate_gradients(model, batches)
    model.activation_checkpointing_enable({"use_reentrant": True})
    before = model.vit.layers[0]._gradient_checkpointing_func
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(lora_one.estimate_gradients(model, batches), exact, 1e-6)
    assert model.vit.layers[0]._gradient_checkpointing_func is before


@pytest.mark.parametrize("strategy", ["hold", "groups"])
def test_layers_that_no_batch_reaches_have_a_zero_gradient_also_alone(strategy):
    model, ids = Shared(), torch.arange(5)[None]
    batches = [{"input_ids": ids, "labels": ids}] * 2
    names = ["unused", "head"] if strategy == "groups" else ["unused"]
    ours = lora_one.estimate_gradients(
        model, batches, target_modules=names, strategy=strategy, memory_budget=1
    )
    assert list(ours) == names and not ours["unused"].any()


@pytest.mark.parametrize("kind", ["XLNet", "Flaubert"])
def test_language_models_that_shift_nothing_are_weighted_by_all_their_labels(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_layer": 1, "d_inner": 48, "n_layers": 1, "n_heads": 4}
    own = {"XLNet": {"d_model": 32, "n_head": 4}, "Flaubert": {"emb_dim": 32}}[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes, **own, pad_index=0)
    heads = {"XLNet": "XLNetLMHeadModel", "Flaubert": "FlaubertWithLMHeadModel"}
    model = getattr(transformers, heads[kind])(config).eval()
    ids = torch.randint(2, 61, (3, 7))
    labels = ids.clone()
    labels[0, 1:], labels[1:, 0] = -100, -100
    rows = [{"input_ids": x[None], "labels": y[None]} for x, y in zip(ids, labels, strict=True)]
    together = [{"input_ids": ids, "labels": labels}]
    exact = lora_one.estimate_gradients(model, together, train=False)
    assert_equal(lora_one.estimate_gradients(model, rows, train=False), exact, 1e-5)


@pytest.mark.parametrize("method", ["lora", "pissa", "lora_one"])
def test_an_adapted_router_is_refused_before_peft_trips_over_what_it_returns(method):
    torch.manual_seed(0)
    config = transformers.PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    base = transformers.PhimoeForCausalLM(config)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(lora_one.InputError, match=r"layer 'model.layers.0.mlp.router' returns a t"):
        lora_one.initialize(model, batches_for(), method=method)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_router_may_be_adapted_as_a_parameter():
    torch.manual_seed(0)
    config = transformers.PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    adapter = LoraConfig(r=2, target_parameters=["mlp.router.weight"])
    model = get_peft_model(transformers.PhimoeForCausalLM(config), adapter)
    report = lora_one.initialize(model, batches_for(), method="lora")
    assert report.loss_after == report.loss_before


def test_of_a_gate_with_one_output_lora_ga_says_that_no_rank_fits():
    config = transformers.Qwen2MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2)
    gate = LoraConfig(r=1, target_modules=["shared_expert_gate"])
    model = get_peft_model(transformers.Qwen2MoeForCausalLM(config), gate)
    with pytest.raises(lora_one.InputError, match=r"2 r <= 1, so no rank fits; leave it out"):
        lora_one.initialize(model, batches_for(), method="lora_ga")


def test_an_offset_that_the_outputs_miss_is_told(llama_batches):
    """A weight that the model uses without calling its layer loses ``s B A``, and gains nothing."""
    peft_model = adapted(tiny_llama(), r=16, targets=["down_proj"])
    for layer in peft_model.get_base_model().model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: nn.functional.linear(
            mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight
        )
    report = lora_one.initialize(peft_model, llama_batches, method="pissa")
    (warning,) = report.warnings
    assert "without calling the layer" in warning
