"""4-bit and 8-bit bases: the gradient is taken without any weight's own gradient."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_one
from lora_one.layers import adapted_layers, base_weight, is_quantised

from .tiny import adapted, batches_for, logits, perturb, tiny_llama

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def quantised_llama(bits, *, keeps_weights=False):
    """Replace every linear layer but the head by its bitsandbytes version."""
    # bitsandbytes wants sizes that are multiples of its block.
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or name == "lm_head":
            continue
        sizes = {"bias": False}
        if bits == 4:
            new = bnb.nn.Linear4bit(
                module.in_features, module.out_features, compute_dtype=torch.float32, **sizes
            )
            new.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False)
        else:
            new = bnb.nn.Linear8bitLt(
                module.in_features,
                module.out_features,
                has_fp16_weights=keeps_weights,
                **sizes,
            )
            new.weight = bnb.nn.Int8Params(
                module.weight.data.clone(), requires_grad=False, has_fp16_weights=keeps_weights
            )
        model.set_submodule(name, new.to("cpu"))
    return model


def dequantised_twin(quantised):
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    model.load_state_dict(
        {k: v for k, v in quantised.state_dict().items() if "_proj" not in k}, strict=False
    )
    for name, module in quantised.named_modules():
        if is_quantised(module) and hasattr(module, "in_features"):
            model.get_submodule(name).weight.data = base_weight(module).float()
    return model


@pytest.fixture(params=[4, 8])
def quantised(request):
    try:
        model = quantised_llama(request.param)
        batch = batches_for()[0]
        model(**batch).loss  # noqa: B018 (does this build of bitsandbytes run here at all?)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        pytest.skip(f"bitsandbytes cannot run {request.param}-bit layers here: {error}")
    return model


def tolerance(model):
    # 8-bit layers also quantise activations to 7 bits; 4-bit layers compute in fp32.
    eight = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    return 0.1 if eight else 1e-3


def test_gradient_is_that_of_the_dequantised_model(quantised, llama_batches):
    ours = lora_one.estimate_gradients(quantised, llama_batches)
    exact = lora_one.estimate_gradients(dequantised_twin(quantised), llama_batches)
    assert list(ours) == list(exact)
    for name, gradient in exact.items():
        assert ours[name].shape == gradient.shape
        error = float((ours[name] - gradient).norm() / gradient.norm())
        assert error < tolerance(quantised), name


def test_lora_one_starts_and_trains_on_a_quantised_base(quantised, llama_batches, tmp_path):
    before = {
        name: base_weight(m).clone() for name, m in quantised.named_modules() if "proj" in name
    }
    bits = 8 if any(type(m).__name__ == "Linear8bitLt" for m in quantised.modules()) else 4
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    peft_model = get_peft_model(quantised, config)  # 8-bit parameters do not survive deepcopy
    assert adapted_layers(peft_model)[0].shape == (64, 64)
    report = lora_one.initialize(peft_model, llama_batches, method="lora_one")
    assert report.loss_after < report.loss_before
    assert all(entry.norm_ratio > 0 for entry in report.layers)
    for layer in adapted_layers(peft_model):
        assert torch.equal(base_weight(layer.module), before[layer.name])
    perturb(peft_model)
    lora_one.export_adapter(peft_model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(quantised_llama(bits), tmp_path / "a")
    difference = (logits(loaded, llama_batches[0]) - logits(peft_model, llama_batches[0])).abs()
    assert float(difference.max()) < 1e-3


def test_8_bit_layers_that_keep_their_weights_are_read_as_they_are(llama_batches):
    """They round anew in every pass, which leaves scales behind that W has nothing to do with."""
    plain, keeping = (
        tiny_llama(hidden_size=64, intermediate_size=128),
        quantised_llama(8, keeps_weights=True),
    )
    ratios = []
    for model in (plain, keeping):
        report = lora_one.initialize(adapted(model), llama_batches, method="lora_one")
        ratios.append([layer.norm_ratio for layer in report.layers])
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-2)
    with pytest.raises(lora_one.InputError, match="is quantised, and pissa would have to rewrite"):
        lora_one.initialize(adapted(keeping), llama_batches, method="pissa", force=True)


def four_bit_modules(model):
    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]


def test_a_start_does_not_bring_4_bit_weights_into_the_layout_for_inference(llama_batches):
    model = adapted(quantised_llama(4))
    for module in four_bit_modules(model):  # as on a CPU with AVX512-BF16
        module.support_avx512bf16_for_cpu = True
    lora_one.initialize(model, llama_batches, method="lora_one", train=False)
    for module in four_bit_modules(model):
        assert module.support_avx512bf16_for_cpu
        assert not getattr(module.weight.quant_state, "packing_format_for_cpu", False)


def test_4_bit_weights_in_the_layout_for_inference_are_refused_before_anything_changes(
    llama_batches,
):
    model = adapted(quantised_llama(4))
    before = {name: p.clone() for name, p in model.named_parameters() if ".lora_" in name}
    four_bit_modules(model)[-1].weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"no gradient passes through .*down_proj'"):
        lora_one.initialize(model, llama_batches, method="lora_one")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_methods_that_rewrite_the_weight_are_refused_with_the_way_out(quantised, llama_batches):
    for method in ("pissa", "lora_ga"):
        with pytest.raises(
            lora_one.InputError, match=r"quantised.*leave it alone: lora, eva, lora_one"
        ):
            lora_one.initialize(adapted(quantised), llama_batches, method=method)
