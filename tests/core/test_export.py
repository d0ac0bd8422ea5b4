"""Whatever the method, the export is a plain LoRA that gives the trained model on the old base."""

import copy
import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file
from torch import nn

import lora_one
from lora_one.adapters.write import initial_state
from lora_one.layers import adapted_layers
from lora_one.numerics.methods import METHODS

from .tiny import (
    MODELS,
    TARGETS,
    Endings,
    adapted,
    batches_for,
    logits,
    perturb,
    tiny_llama,
    tiny_mixtral,
)

# Logits are of order 1 to 10, and both sides are computed in fp32.
TOLERANCE = 3e-5


def trained(model, method="pissa", batches=None, **options):
    peft_model = adapted(model, **options)
    lora_one.initialize(peft_model, batches or batches_for(), method=method)
    perturb(peft_model)
    return peft_model


def difference(path, base, peft_model, batch):
    loaded = PeftModel.from_pretrained(base, path)
    return float((logits(loaded, batch) - logits(peft_model, batch)).abs().max())


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_round_trip(method, use_rslora, use_dora, tmp_path, llama_batches):
    peft_model = trained(tiny_llama(), method, use_rslora=use_rslora, use_dora=use_dora)
    report = lora_one.export_adapter(peft_model, tmp_path / "a")
    assert difference(tmp_path / "a", tiny_llama(), peft_model, llama_batches[0]) < TOLERANCE
    config = config_of(tmp_path / "a")
    offset = METHODS[method].offset
    assert (report.rank, report.truncation_error) == (8 if offset else 4, 0.0)
    assert (config["r"], config["lora_alpha"]) == ((8, 16) if offset else (4, 8))
    assert isinstance(config["lora_alpha"], int)
    assert config["use_rslora"] is use_rslora
    assert config["init_lora_weights"] is True
    assert config["inference_mode"] is True
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip_on_every_architecture(kind, tmp_path):
    batches = batches_for(kind)
    peft_model = trained(
        MODELS[kind](), "lora_ga", batches, targets=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
    )
    lora_one.export_adapter(peft_model, tmp_path / "a")
    assert difference(tmp_path / "a", MODELS[kind](), peft_model, batches[0]) < TOLERANCE


def test_plain_methods_export_their_factors_untouched(tmp_path):
    peft_model = trained(tiny_llama(), "lora_one", use_rslora=True)
    lora_one.export_adapter(peft_model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for layer in adapted_layers(peft_model):
        assert torch.equal(tensors[f"base_model.model.{layer.name}.lora_A.weight"], layer.A)
        assert torch.equal(tensors[f"base_model.model.{layer.name}.lora_B.weight"], layer.B)


@pytest.mark.parametrize("method", ["lora_one", "lora_ga"])
def test_a_scaling_that_was_changed_after_the_start_is_exported(method, tmp_path, llama_batches):
    peft_model = trained(tiny_llama(), method, use_rslora=True)
    with rescale_adapter_scale(peft_model, 0.5):
        lora_one.export_adapter(peft_model, tmp_path / "a")
        off = difference(tmp_path / "a", tiny_llama(), peft_model, llama_batches[0])
    assert off < TOLERANCE


def test_export_before_training_is_rehearsed_exactly(tmp_path, llama, llama_batches):
    peft_model = adapted(llama)
    lora_one.initialize(peft_model, llama_batches, method="lora_ga")
    lora_one.export_adapter(peft_model, tmp_path / "a")
    assert difference(tmp_path / "a", tiny_llama(), peft_model, llama_batches[0]) < TOLERANCE


@pytest.mark.parametrize("method", ["pissa", "lora_one"])
@pytest.mark.parametrize("rank", [1, 4, 6, 20])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_truncation_error_is_the_tail_of_the_singular_values(method, rank, use_rslora, tmp_path):
    options = {"use_rslora": use_rslora, "alpha_pattern": {"q_proj": 24}}
    peft_model = trained(tiny_llama(), method, **options)
    report = lora_one.export_adapter(peft_model, tmp_path / "a", rank=rank)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    start = initial_state(peft_model).factors if METHODS[method].offset else {}
    tails, totals = 0.0, 0.0
    for layer, cut in zip(adapted_layers(peft_model), adapted_layers(loaded), strict=True):
        product = layer.s * layer.B.detach().double() @ layer.A.detach().double()
        if layer.name in start:
            B0, A0 = start[layer.name]
            product -= layer.s * B0.double() @ A0.double()
        S = torch.linalg.svdvals(product)
        tail, total = float(S[rank:].square().sum()), float(S.square().sum())
        assert report.layer_errors[layer.name] == pytest.approx((tail / total) ** 0.5, abs=1e-6)
        written = cut.s * cut.B.detach().double() @ cut.A.detach().double()
        error = float((written - product).norm())
        assert error == pytest.approx(tail**0.5, rel=1e-3, abs=1e-6 * total**0.5)
        tails, totals = tails + tail, totals + total
    assert report.truncation_error == pytest.approx((tails / totals) ** 0.5, abs=1e-6)
    assert (report.rank, config_of(tmp_path / "a")["lora_alpha"]) == (rank, 8)


@pytest.mark.parametrize("method", ["lora_one", "pissa"])
@pytest.mark.parametrize(
    "targets",
    [["q_proj", "mlp.up_proj"], r".*layers\.1\..*(v|o)_proj", "all-linear"],
    ids=["list", "regex", "all-linear"],
)
def test_targets_are_named_as_peft_takes_them(method, targets, tmp_path, llama_batches):
    peft_model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=targets))
    names = [layer.name for layer in adapted_layers(peft_model)]
    report = lora_one.initialize(peft_model, llama_batches, method=method)
    assert [layer.name for layer in report.layers] == names
    perturb(peft_model)
    lora_one.export_adapter(peft_model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    assert [layer.name for layer in adapted_layers(loaded)] == names
    assert difference(tmp_path / "a", tiny_llama(), peft_model, llama_batches[0]) < TOLERANCE


@pytest.mark.parametrize("method", ["lora_one", "pissa"])
def test_an_adapter_of_another_name_is_exported(method, tmp_path, llama_batches):
    config = LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"])
    peft_model = get_peft_model(tiny_llama(), config, adapter_name="mine")
    lora_one.initialize(peft_model, llama_batches, method=method, adapter_name="mine")
    perturb(peft_model)
    lora_one.export_adapter(peft_model, tmp_path / "a", adapter_name="mine")
    assert difference(tmp_path / "a", tiny_llama(), peft_model, llama_batches[0]) < TOLERANCE


def test_several_adapters_on_one_base_are_started_and_exported_one_by_one(tmp_path, llama_batches):
    peft_model = adapted(tiny_llama(), use_rslora=True)
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    peft_model.add_adapter("third", LoraConfig(r=3, use_dora=True, target_modules=["o_proj"]))
    methods = {"default": "lora_one", "second": "lora", "third": "lora_one"}
    for name, method in methods.items():
        peft_model.set_adapter(name)
        lora_one.initialize(peft_model, llama_batches, method=method, adapter_name=name)
        perturb(peft_model, size=0.1)
    for name in methods:
        peft_model.set_adapter(name)
        lora_one.export_adapter(peft_model, tmp_path / name, adapter_name=name)
        assert difference(tmp_path / name, tiny_llama(), peft_model, llama_batches[0]) < TOLERANCE


def test_patterns_embeddings_and_saved_modules_are_included(tmp_path, llama_batches):
    peft_model = trained(
        tiny_llama(),
        "pissa",
        targets=["embed_tokens", "q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 3},
        modules_to_save=["lm_head"],
        use_rslora=True,
    )
    lora_one.export_adapter(peft_model, tmp_path / "a")
    assert difference(tmp_path / "a", tiny_llama(), peft_model, llama_batches[0]) < TOLERANCE
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(key.endswith("lm_head.weight") for key in tensors)
    assert not any(key.endswith("embed_tokens.weight") for key in tensors)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("method", ["lora_one", "pissa"])
@pytest.mark.parametrize("rank", [None, 8])
def test_the_bias_of_lora_b_keeps_its_scaling(use_rslora, method, rank, tmp_path, llama_batches):
    peft_model = trained(
        tiny_llama(attention_bias=True, mlp_bias=True),
        method,
        use_rslora=use_rslora,
        lora_bias=True,
    )
    lora_one.export_adapter(peft_model, tmp_path / "a", rank=rank)  # 8 = 2 r loses nothing
    base = tiny_llama(attention_bias=True, mlp_bias=True)
    assert difference(tmp_path / "a", base, peft_model, llama_batches[0]) < TOLERANCE


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_for_a_layer_leaves_those_alone_whose_names_end_like_it(pattern, tmp_path):
    config = LoraConfig(r=4, target_modules=["proj", "other"], **{pattern: {"^proj": 2}})
    peft_model = get_peft_model(Endings(), config)
    perturb(peft_model, size=0.3)
    lora_one.export_adapter(peft_model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(Endings(), tmp_path / "a")
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), peft_model(x))


@pytest.mark.parametrize("method", ["lora_one", "lora_ga", "pissa"])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("pattern", [{}, {"experts.gate_up_proj": 2}])
def test_adapted_parameters_keep_their_ranks(method, rank, pattern, tmp_path, llama_batches):
    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern=pattern,
    )
    peft_model = get_peft_model(tiny_mixtral(), config)
    lora_one.initialize(peft_model, llama_batches, method=method)
    perturb(peft_model)
    lora_one.export_adapter(peft_model, tmp_path / "a", rank=rank)  # 8 = 2 r loses nothing
    assert difference(tmp_path / "a", tiny_mixtral(), peft_model, llama_batches[0]) < TOLERANCE


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x, labels=None):
        return {"loss": self.head(self.attention(x, x, x)[0]).square().mean()}


@pytest.mark.parametrize("method", ["lora_one", "pissa"])
@pytest.mark.parametrize("rank", [None, 4])
def test_multihead_attention_keeps_pefts_start_and_rank(method, rank, tmp_path):
    peft_model = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attention", "head"]))
    report = lora_one.initialize_adapters(peft_model, {"head": torch.randn(4, 16)}, method=method)
    assert report.left_to_peft == ["attention", "attention.base_layer.out_proj"]
    perturb(peft_model)
    lora_one.export_adapter(peft_model, tmp_path / "a", rank=rank)
    loaded = PeftModel.from_pretrained(Attention(), tmp_path / "a")
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(loaded(x)["loss"], peft_model(x)["loss"])


@pytest.mark.parametrize("method", ["lora", "lora_one", "pissa"])
@pytest.mark.parametrize("rank", [None, 8])
def test_a_head_that_shares_the_embeddings_adapter_keeps_its_start(
    method, rank, tmp_path, llama_batches
):
    base = tiny_llama(tie_word_embeddings=True)
    options = {"targets": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    peft_model = adapted(base, **options)
    report = lora_one.initialize(peft_model, llama_batches, method=method)
    assert report.left_to_peft == ["model.embed_tokens", "lm_head"]
    embedding = peft_model.get_base_model().model.embed_tokens
    assert not embedding.lora_embedding_A["default"].any()
    perturb(peft_model)
    lora_one.export_adapter(peft_model, tmp_path / "a", rank=rank)
    assert difference(tmp_path / "a", base, peft_model, llama_batches[0]) < TOLERANCE


def test_a_start_comes_along_when_the_model_is_copied_or_stored(tmp_path, llama_batches):
    peft_model = trained(tiny_llama())
    torch.save(peft_model, tmp_path / "model.pt")
    stored = torch.load(tmp_path / "model.pt", weights_only=False)
    for model in (copy.deepcopy(peft_model), stored):
        lora_one.export_adapter(model, tmp_path / "a")
        assert difference(tmp_path / "a", tiny_llama(), peft_model, llama_batches[0]) < TOLERANCE


def test_an_alpha_of_zero_is_kept_or_refused(tmp_path, llama_batches):
    peft_model = adapted(tiny_llama(), alpha=0)
    perturb(peft_model)
    for rank in (None, 2):
        lora_one.export_adapter(peft_model, tmp_path / "a", rank=rank)
        assert difference(tmp_path / "a", tiny_llama(), peft_model, llama_batches[0]) == 0
    mixed = adapted(tiny_llama(), alpha=0, alpha_pattern={"q_proj": 4})
    with pytest.raises(lora_one.InputError, match="lora_alpha is 0, but"):
        lora_one.export_adapter(mixed, tmp_path / "b", rank=2)


def test_adalora_becomes_a_plain_lora(tmp_path, llama_batches):
    config = AdaLoraConfig(
        init_r=4, total_step=10, target_modules=["q_proj", "v_proj"], lora_alpha=8
    )
    peft_model = get_peft_model(tiny_llama(), config)
    perturb(peft_model, size=0.3)
    report = lora_one.export_adapter(peft_model, tmp_path / "a")
    assert report.rank == 4
    assert config_of(tmp_path / "a")["peft_type"] == "LORA"
    assert difference(tmp_path / "a", tiny_llama(), peft_model, llama_batches[0]) < TOLERANCE


def test_bf16_adapters_keep_their_dtype(tmp_path, llama_batches):
    peft_model = adapted(tiny_llama())
    lora_one.initialize(peft_model, llama_batches, method="pissa", dtype=torch.bfloat16)
    lora_one.export_adapter(peft_model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_an_adapter_is_replaced_and_nothing_else(tmp_path):
    peft_model = trained(tiny_llama())
    path = tmp_path / "deep" / "a"
    lora_one.export_adapter(peft_model, path)
    lora_one.export_adapter(peft_model, path, rank=2)
    assert config_of(path)["r"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["a"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("mine")
    for place in (tmp_path / "notes", tmp_path / "notes" / "x.txt"):
        with pytest.raises(lora_one.InputError, match="holds no adapter"):
            lora_one.export_adapter(peft_model, place)
    with pytest.raises(lora_one.InputError, match="at least 1"):
        lora_one.export_adapter(peft_model, path, rank=0)
    with pytest.raises(lora_one.InputError, match="no adapter named 'x'"):
        lora_one.export_adapter(peft_model, path, adapter_name="x")
