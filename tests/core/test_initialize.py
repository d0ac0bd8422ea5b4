"""What an initialisation writes, reports and refuses."""

import copy
import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import lora_one
from lora_one.adapters.cache import fingerprint, store
from lora_one.adapters.merge import merge_adapter
from lora_one.adapters.state import load_initial_state, save_initial_state
from lora_one.adapters.write import Options
from lora_one.layers import adapted_layers, base_weight
from lora_one.numerics.methods import METHODS

from .tiny import MODELS, TARGETS, adapted, batches_for, logits, perturb, tiny_llama

OFFSET = [name for name, method in METHODS.items() if method.offset]


def largest(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["lora", *OFFSET])
@pytest.mark.parametrize("use_dora", [False, True])
def test_outputs_do_not_change_at_the_start(kind, method, use_dora):
    model, batches = MODELS[kind](), batches_for(kind)
    options = {"targets": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", "use_dora": use_dora}
    peft_model = adapted(model, **options)
    report = lora_one.initialize(peft_model, batches, method=method)
    # Logits are of order 1 to 10; the offset is computed and rounded in fp32.
    assert largest(logits(peft_model, batches[0]), logits(model, batches[0])) < 2e-5
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-5)
    assert report.offset == (method != "lora")


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_one_takes_one_rank_r_step_of_descent(use_dora, use_rslora, llama, llama_batches):
    peft_model = adapted(llama, use_dora=use_dora, use_rslora=use_rslora)
    gradients = lora_one.estimate_gradients(peft_model, llama_batches)
    lora_one.initialize(peft_model, llama_batches, method="lora_one", stable_gamma=16)
    stepped = copy.deepcopy(llama)
    s = 8 / 2 if use_rslora else 8 / 4
    for name, G in gradients.items():
        U, S, Vh = torch.linalg.svd(-G.double(), full_matrices=False)
        step = s / (16 * S[0]) * (U[:, :4] * S[:4]) @ Vh[:4]
        stepped.get_submodule(name).weight.data += step.float()
    # The start is exactly W + s B0 A0, also under DoRA, whose magnitude starts as its norm.
    difference = largest(logits(peft_model, llama_batches[0]), logits(stepped, llama_batches[0]))
    assert difference < 2e-5


def test_lora_matches_pefts_start_in_distribution_and_keeps_b_zero(llama):
    peft_model = adapted(llama)
    lora_one.initialize(peft_model, method="lora")
    for layer in adapted_layers(peft_model):
        assert layer.B.abs().max() == 0
        assert 0 < layer.A.abs().max() <= layer.shape[1] ** -0.5


@pytest.mark.parametrize("method", ["lora_one", "lora_ga", "pissa"])
def test_streaming_equals_explicit_gradients(method, llama, llama_batches):
    streamed, explicit = adapted(llama), adapted(llama)
    gradients = lora_one.estimate_gradients(explicit, llama_batches)
    first = lora_one.initialize(streamed, llama_batches, method=method)
    second = lora_one.initialize_adapters(explicit, gradients, method=method)
    for a, b in zip(streamed.state_dict().values(), explicit.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert first.layers == second.layers


def test_report_is_json_and_its_numbers_are_right(llama, llama_batches):
    peft_model = adapted(llama)
    gradients = lora_one.estimate_gradients(peft_model, llama_batches)
    report = lora_one.initialize(peft_model, llama_batches, method="lora_one")
    json.dumps(report.to_dict(), allow_nan=False)
    assert [entry.name for entry in report.layers] == [x.name for x in adapted_layers(peft_model)]
    for entry, layer in zip(report.layers, adapted_layers(peft_model), strict=True):
        S = torch.linalg.svdvals(gradients[entry.name].double())
        torch.testing.assert_close(
            torch.tensor([*entry.singular_values, entry.next_singular_value]),
            S[:5].float(),
            rtol=1e-4,
            atol=1e-7,
        )
        assert entry.captured_energy == pytest.approx(
            float(S[:4].square().sum() / S.square().sum())
        )
        product = layer.s * layer.B.detach() @ layer.A.detach()
        ratio = product.norm() / base_weight(layer.module).norm()
        assert entry.norm_ratio == pytest.approx(float(ratio), rel=1e-4)
    assert report.loss_after < report.loss_before
    assert "lora_one: 6 layers" in report.summary()


def test_rising_loss_is_reported_with_advice(llama, llama_batches):
    # No normalisation follows to save it.
    peft_model = adapted(llama, targets=["lm_head"], alpha=80)
    report = lora_one.initialize(peft_model, llama_batches, method="lora_one", stable_gamma=1)
    assert report.loss_after > report.loss_before
    assert "raise stable_gamma" in report.warnings[-1]
    options = {"method": "lora_one", "scale": "unit", "force": True}
    report = lora_one.initialize(peft_model, llama_batches, **options)
    assert report.loss_after > report.loss_before  # the step is s / S_0, whatever gamma
    assert "the scale 'unit' makes too large a step" in report.warnings[-1]


@pytest.mark.parametrize("norm_clip", [False, True])  # at gamma = 1 it clips
def test_gamma_is_searched_by_the_loss_after_the_start(norm_clip, llama, llama_batches):
    options = {"method": "lora_one", "norm_clip": norm_clip}
    found, fixed = adapted(llama), adapted(llama)
    report = lora_one.initialize(found, llama_batches, stable_gamma="auto", **options)
    losses = {entry["stable_gamma"]: entry["loss"] for entry in report.gamma_search}
    assert losses[report.stable_gamma] == min(losses.values())
    assert report.loss_after == pytest.approx(min(losses.values()), rel=1e-6)
    same = lora_one.initialize(fixed, llama_batches, stable_gamma=report.stable_gamma, **options)
    batch = llama_batches[0]
    assert largest(logits(found, batch), logits(fixed, batch)) < 1e-5
    for ours, theirs in zip(report.layers, same.layers, strict=True):
        assert ours.norm_ratio == pytest.approx(theirs.norm_ratio, rel=1e-5)


def test_mixed_ranks_and_alphas_are_followed_layer_by_layer(llama, llama_batches):
    peft_model = adapted(llama, rank_pattern={"v_proj": 2}, alpha_pattern={"down_proj": 32})
    report = lora_one.initialize(peft_model, llama_batches, method="lora_ga")
    assert {entry.rank for entry in report.layers} == {2, 4}
    assert largest(logits(peft_model, llama_batches[0]), logits(llama, llama_batches[0])) < 2e-5


def test_bf16_factors_are_rounded_before_the_offset(llama, llama_batches):
    peft_model = adapted(llama)
    before = {x.name: base_weight(x.module).clone() for x in adapted_layers(peft_model)}
    lora_one.initialize(peft_model, llama_batches, method="pissa", dtype=torch.bfloat16)
    for layer in adapted_layers(peft_model):
        assert layer.A.dtype == layer.B.dtype == torch.bfloat16
        product = layer.s * layer.B.detach().float() @ layer.A.detach().float()
        # Exact up to one fp32 rounding, although the factors carry 8 bits only.
        assert largest(base_weight(layer.module) + product, before[layer.name]) < 1e-6


def test_norm_clip_bounds_the_start_by_the_weight(llama, llama_batches):
    peft_model = adapted(llama)
    lora_one.initialize(
        peft_model, llama_batches, method="lora_one", stable_gamma=1e-4, norm_clip=True
    )
    for layer in adapted_layers(peft_model):
        product = layer.s * layer.B.detach() @ layer.A.detach()
        bound = float(base_weight(layer.module).abs().max())
        assert float(product.abs().max()) == pytest.approx(bound, rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "lora_one", "pissa", "olora"])
@pytest.mark.parametrize("norm_clip", [False, True])
def test_a_weight_of_zero_gets_finite_factors(method, norm_clip, llama, llama_batches):
    name = "model.layers.1.self_attn.q_proj"
    with torch.no_grad():
        llama.get_submodule(name).weight.zero_()
    peft_model = adapted(llama)
    report = lora_one.initialize(peft_model, llama_batches, method=method, norm_clip=norm_clip)
    json.dumps(report.to_dict(), allow_nan=False)
    layer = next(x for x in adapted_layers(peft_model) if x.name == name)
    assert layer.B.isfinite().all()
    assert layer.A.isfinite().all()
    if method != "lora_one" or norm_clip:
        assert not (layer.B @ layer.A).any()


@pytest.mark.parametrize("method", [m for m in [*OFFSET, "lora_one"] if not METHODS[m].inputs])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_start_is_computed_in_full_precision_under_autocast(
    method, use_dora, llama, llama_batches
):
    gradients = lora_one.estimate_gradients(adapted(llama), llama_batches)
    plain, cast = adapted(llama, use_dora=use_dora), adapted(llama, use_dora=use_dora)
    expected = lora_one.initialize_adapters(plain, gradients, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        cast(**llama_batches[0])  # leaves copies of the factors in half precision
        report = lora_one.initialize_adapters(cast, gradients, method=method)
        inside = logits(cast, llama_batches[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, logits(cast, llama_batches[0]))
    assert report.layers == expected.layers
    for a, b in zip(plain.state_dict().values(), cast.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_is_compiled_for_the_start_of_a_compiled_model(
    llama, llama_batches, wrapped, monkeypatch
):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = adapted(llama)
    if wrapped:
        layers = model.get_base_model().model.layers
        layers[0] = torch.compile(layers[0], backend=backend)
    else:
        model.compile(backend=backend)
    report = lora_one.initialize(model, llama_batches, method="lora_one")
    assert report.layers and not report.warnings
    assert not compiled
    model(**llama_batches[0])
    assert compiled


def test_losses_are_those_of_the_started_adapter_alone(llama, llama_batches):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    alone = get_peft_model(copy.deepcopy(llama), config, adapter_name="second")
    beside = adapted(llama)
    perturb(beside, size=0.3)
    beside.add_adapter("second", config)
    beside.base_model.set_adapter(["default", "second"])
    trainable = [p.requires_grad for p in beside.parameters()]
    options = {"method": "lora_one", "stable_gamma": "auto", "adapter_name": "second"}
    reports = [lora_one.initialize(x, llama_batches, **options) for x in (alone, beside)]
    assert reports[0].gamma_search == reports[1].gamma_search
    assert reports[0].loss_after == reports[1].loss_after < reports[1].loss_before
    layers = [module for module in beside.modules() if isinstance(module, LoraLayer)]
    assert all(layer.active_adapters == ["default", "second"] for layer in layers)
    assert [p.requires_grad for p in beside.parameters()] == trainable


def test_an_adapter_starts_beside_one_that_trains_tokens(llama, llama_batches):
    peft_model = adapted(llama, trainable_token_indices=[1, 2])
    peft_model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    peft_model.set_adapter("b")
    report = lora_one.initialize(
        peft_model, llama_batches, method="lora_one", adapter_name="b", stable_gamma="auto"
    )
    assert report.loss_after < report.loss_before
    assert peft_model.active_adapters == ["b"]


def test_offset_of_a_tied_head_leaves_the_embedding_alone(llama_batches):
    model = tiny_llama(tie_word_embeddings=True)
    peft_model = adapted(model, targets=["lm_head"])
    lora_one.initialize(peft_model, llama_batches, method="pissa")
    assert torch.equal(
        peft_model.get_base_model().model.embed_tokens.weight, model.model.embed_tokens.weight
    )
    assert largest(logits(peft_model, llama_batches[0]), logits(model, llama_batches[0])) < 2e-5


def test_embedding_adapters_keep_pefts_start_and_are_named(llama, llama_batches):
    peft_model = adapted(llama, targets=["embed_tokens", "q_proj"])
    report = lora_one.initialize(peft_model, llama_batches, method="pissa")
    assert report.left_to_peft == ["model.embed_tokens"]
    assert largest(logits(peft_model, llama_batches[0]), logits(llama, llama_batches[0])) < 2e-5


def test_layer_without_gradient_keeps_pefts_start(llama, llama_batches):
    peft_model = adapted(llama)
    gradients = lora_one.estimate_gradients(peft_model, llama_batches)
    name = "model.layers.0.self_attn.v_proj"
    gradients[name].zero_()
    report = lora_one.initialize_adapters(peft_model, gradients, method="lora_one")
    assert report.left_to_peft == [name]
    assert name in report.warnings[0]
    layer = next(x for x in adapted_layers(peft_model) if x.name == name)
    assert layer.B.abs().max() == 0


def test_adalora_keeps_its_own_start(llama):
    config = AdaLoraConfig(init_r=4, total_step=10, target_modules=["q_proj"], lora_alpha=8)
    peft_model = get_peft_model(llama, config)
    report = lora_one.initialize(peft_model, method="lora")
    assert report.left_to_peft == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    with pytest.raises(lora_one.InputError, match="AdaLoRA"):
        lora_one.initialize(peft_model, batches_for(), method="lora_one")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_saved_start_is_restored_bit_for_bit(method, use_dora, tmp_path, llama_batches):
    first = adapted(tiny_llama(), use_dora=use_dora)
    lora_one.initialize(first, llama_batches, method=method)
    save_initial_state(first, tmp_path / "start.safetensors")
    second = adapted(tiny_llama(), use_dora=use_dora)
    state = load_initial_state(second, tmp_path / "start.safetensors")
    assert (state.method, state.offset) == (method, METHODS[method].offset)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    if METHODS[method].offset:
        with pytest.raises(lora_one.InputError, match="already initialised"):
            load_initial_state(second, tmp_path / "start.safetensors")


@pytest.mark.parametrize("method", ["lora_one", "pissa"])
def test_cache_gives_the_same_start_and_notices_every_change(method, tmp_path, llama_batches):
    def start(model=None, batches=llama_batches, **options):
        peft_model = adapted(model or tiny_llama())
        options = {"method": method, "cache_dir": tmp_path, **options}
        return lora_one.initialize(peft_model, batches, **options), peft_model

    first, second = start(), start()
    assert (first[0].cached, second[0].cached) == (False, True)
    assert second[0].layers == first[0].layers
    assert second[0].loss_after == first[0].loss_after
    for a, b in zip(first[1].state_dict().values(), second[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-3
    assert not start(model=changed)[0].cached
    assert not start(batches=batches_for(seed=8))[0].cached
    assert not start(seed=1)[0].cached
    assert not start(train=False)[0].cached
    assert not start(model=tiny_llama(rms_norm_eps=0.5))[0].cached
    assert not start(model=tiny_llama().double())[0].cached
    assert len(list(tmp_path.iterdir())) == 2 * 7


def test_a_cache_key_tells_batches_by_every_number_of_their_tensors(llama):
    pictures = torch.zeros(2, 5000)
    pictures[1, 2500] = 1.0  # in the middle, which a printed tensor leaves out
    peft_model, options = adapted(llama), Options(method="lora")
    keys = {
        fingerprint(peft_model, [], [{"pictures": [{"pixels": picture}]}], options)
        for picture in pictures
    }
    assert len(keys) == 2


def test_a_cached_start_that_others_may_be_reading_is_not_replaced(tmp_path, llama_batches):
    def start(peft_model):
        return lora_one.initialize(peft_model, llama_batches, method="lora_one", cache_dir=tmp_path)

    report = start(adapted(tiny_llama()))
    files = {file: file.stat().st_ino for file in tmp_path.iterdir()}
    late = adapted(tiny_llama())
    lora_one.initialize(late, llama_batches, method="lora_one")
    store(late, tmp_path, next(iter(files)).stem, report)
    assert {file: file.stat().st_ino for file in tmp_path.iterdir()} == files
    # Half of an entry, which a crash has left, is made whole.
    next(file for file in files if file.suffix == ".json").unlink()
    assert not start(adapted(tiny_llama())).cached
    assert start(adapted(tiny_llama())).cached
    # One whose numbers have changed is none, and neither is one whose report is no JSON.
    weights = next(file for file in files if file.suffix == ".safetensors")
    content = weights.read_bytes()
    for file, damaged in (
        (weights, content[:-1] + bytes([content[-1] ^ 1])),
        (weights, content[:99]),
        (weights.with_suffix(".json"), b"{"),
    ):
        file.write_bytes(damaged)
        assert not start(adapted(tiny_llama())).cached
        assert start(adapted(tiny_llama())).cached


def test_a_start_that_does_not_fit_is_refused(tmp_path, llama, llama_batches):
    with pytest.raises(lora_one.InputError, match="no initial state; initialise"):
        save_initial_state(adapted(llama), tmp_path / "none.safetensors")
    with pytest.raises(lora_one.InputError, match="no initial state at"):
        load_initial_state(adapted(llama), tmp_path / "none.safetensors")
    source = adapted(llama)
    lora_one.initialize(source, method="pissa")
    save_initial_state(source, tmp_path / "start.safetensors")
    with pytest.raises(lora_one.InputError, match="carries no adapter"):
        load_initial_state(adapted(llama, targets=["q_proj"]), tmp_path / "start.safetensors")
    with pytest.raises(lora_one.InputError, match="shapes"):
        load_initial_state(adapted(llama, r=2), tmp_path / "start.safetensors")


def refuse(message, *args, error=lora_one.InputError, **options):
    with pytest.raises(error, match=message):
        lora_one.initialize(*args, **options)


def test_bad_input_is_refused_before_anything_changes(llama, llama_batches):
    peft_model = adapted(llama)
    before = copy.deepcopy(peft_model.state_dict())
    one = {"method": "lora_one"}
    refuse("Did you mean 'lora_one'", peft_model, llama_batches, method="lora_on")
    refuse("Did you mean 'stable'", peft_model, llama_batches, scale="stabel", **one)
    refuse("must be a positive number, got 0", peft_model, llama_batches, stable_gamma=0, **one)
    for gamma in ("best", None):
        refuse("positive number or 'auto'", peft_model, llama_batches, stable_gamma=gamma, **one)
    with pytest.raises(lora_one.InputError, match="must be a positive number, got None"):
        lora_one.initialize_adapters(peft_model, {}, stable_gamma=None, **one)
    refuse("'auto' compares", peft_model, llama_batches, stable_gamma="auto", method="lora_ga")
    refuse("pass the init batches", peft_model, None, **one)
    refuse("no adapter named 'other'", peft_model, llama_batches, adapter_name="other", **one)
    refuse("expected a peft.PeftModel", llama, llama_batches, **one)
    big = adapted(llama, r=17)
    refuse(r"layer 'model.layers.0.self_attn.v_proj'.*at most rank 8", big, [], method="lora_ga")
    refuse("at most rank 16", big, llama_batches, **one)
    after = peft_model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_bad_gradients_are_refused(llama, llama_batches):
    peft_model = adapted(llama)
    good = lora_one.estimate_gradients(peft_model, llama_batches)
    name = next(iter(good))
    for gradients, message in (
        ({k: v for k, v in good.items() if k != name}, f"no gradient for 1 of 6.*{name}"),
        ({**good, "model.norm": good[name]}, "'model.norm', which is no adapted"),
        ({**good, name: good[name][:3]}, r"has shape \(3, 32\), expected \(out, in\) = \(32, 32\)"),
        (None, "no gradient for 6 of 6"),
    ):
        with pytest.raises(lora_one.InputError, match=message):
            lora_one.initialize_adapters(peft_model, gradients, method="lora_one")


def test_model_without_adapted_linear_layers_is_told_its_candidates(llama, llama_batches):
    peft_model = adapted(llama, targets=["embed_tokens"])
    refuse("No linear layer carries.*q_proj", peft_model, llama_batches, method="lora_one")


def test_offset_is_not_taken_twice(llama, llama_batches):
    peft_model = adapted(llama)
    lora_one.initialize(peft_model, llama_batches, method="lora_one")
    lora_one.initialize(peft_model, llama_batches, method="pissa")  # nothing to undo
    refuse("already initialised with pissa", peft_model, llama_batches, method="lora_one")


def test_named_adapters_are_written_one_by_one(llama, llama_batches):
    peft_model = adapted(llama)
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    peft_model.set_adapter("second")
    before = peft_model.state_dict()[
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"
    ]
    before = before.clone()
    report = lora_one.initialize(
        peft_model, llama_batches, method="lora_one", adapter_name="second"
    )
    assert len(report.layers) == 2
    after = peft_model.state_dict()[
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"
    ]
    assert torch.equal(before, after)


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_model_has_the_same_logits(use_dora, llama, llama_batches):
    peft_model = adapted(llama, use_dora=use_dora)
    lora_one.initialize(peft_model, llama_batches, method="pissa")
    perturb(peft_model)
    expected = logits(peft_model, llama_batches[0])
    merged = merge_adapter(peft_model, llama_batches[0])
    assert largest(logits(merged, llama_batches[0]), expected) < 2e-5


def test_merge_that_moves_the_logits_is_noticed(llama, llama_batches):
    peft_model = adapted(llama)
    lora_one.initialize(peft_model, llama_batches, method="pissa")
    with pytest.raises(RuntimeError, match="merging changed the logits"):
        merge_adapter(peft_model, llama_batches[0], dtype=torch.bfloat16, tolerance=1e-6)
