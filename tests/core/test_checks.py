"""What cannot be initialised or exported is refused in one message, and the model is unchanged."""

import copy
from functools import partial

import accelerate
import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from torch import nn

import lora_one
from lora_one.adapters import gamma
from lora_one.adapters.state import load_initial_state, save_initial_state

from .tiny import adapted, batches_for, logits, perturb, tiny_llama

ONE = {"method": "lora_one"}


def snapshot(peft_model):
    return copy.deepcopy(peft_model.state_dict())


def refused(message, peft_model, batches=None, **options):
    """Assert that neither entry point accepts the model, and that both leave it as it is."""
    before = snapshot(peft_model)
    with pytest.raises(lora_one.InputError, match=message) as error:
        lora_one.initialize(peft_model, batches or batches_for(), **{**ONE, **options})
    assert "\n" not in str(error.value)
    with pytest.raises(lora_one.InputError, match=message):
        lora_one.initialize_adapters(peft_model, {}, **{**ONE, **options})
    unchanged(peft_model, before)


def unchanged(peft_model, before):
    after = peft_model.state_dict()
    assert before.keys() == after.keys()
    real = [name for name in before if before[name].device.type != "meta"]
    assert all(torch.equal(before[name], after[name]) for name in real)


def test_models_that_are_no_peft_model_are_refused(llama):
    refused("expected a peft.PeftModel, got LlamaForCausalLM", llama)
    mixed = PeftMixedModel(copy.deepcopy(llama), LoraConfig(target_modules=["q_proj"]))
    refused("expected a peft.PeftModel, got PeftMixedModel", mixed)


def test_a_trained_adapter_is_overwritten_by_force_only(llama, llama_batches):
    peft_model = adapted(llama)
    lora_one.initialize(peft_model, llama_batches, **ONE)
    lora_one.initialize(peft_model, llama_batches, **ONE)  # its own start holds nothing to lose
    start = snapshot(peft_model)
    perturb(peft_model)
    refused("'default' holds factors that are not a start.*q_proj.*force=True", peft_model)
    lora_one.initialize(peft_model, llama_batches, force=True, **ONE)
    unchanged(peft_model, start)


def test_a_loaded_adapter_is_overwritten_by_force_only(tmp_path, llama, llama_batches):
    trained = adapted(llama)
    perturb(trained)
    trained.save_pretrained(tmp_path / "a")
    fresh = adapted(llama)
    lora_one.initialize(fresh, method="lora_one", batches=llama_batches)
    save_initial_state(fresh, tmp_path / "start.safetensors")
    start = snapshot(fresh)

    fresh.load_adapter(tmp_path / "a", "loaded")
    fresh.set_adapter("loaded")
    refused("'loaded' holds factors that are not a start", fresh, adapter_name="loaded")
    with pytest.raises(lora_one.InputError, match="not a start"):
        load_initial_state(trained, tmp_path / "start.safetensors")
    load_initial_state(trained, tmp_path / "start.safetensors", force=True)
    unchanged(trained, start)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_pefts_own_changes_of_the_base_are_noticed(start, tmp_path, llama):
    peft_model = adapted(llama, init_lora_weights=start)
    for force in (False, True):
        message = f"init_lora_weights='{start}', which changes the base weights"
        refused(message, peft_model, force=force)
    with pytest.raises(lora_one.InputError, match="path_initial_model_for_weight_conversion"):
        lora_one.export_adapter(peft_model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_converted_adapter_of_pefts_pissa_is_an_ordinary_one(tmp_path, llama, llama_batches):
    peft_model = adapted(llama, init_lora_weights="pissa")
    peft_model.peft_config["default"].init_lora_weights = True  # what the conversion starts with
    peft_model.save_pretrained(tmp_path / "start")
    perturb(peft_model)
    peft_model.peft_config["default"].init_lora_weights = "pissa"
    expected = logits(peft_model, llama_batches[0])
    peft_model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain")
    lora_one.export_adapter(loaded, tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again")
    torch.testing.assert_close(logits(again, llama_batches[0]), expected, rtol=0, atol=3e-5)


def test_pefts_starts_with_b_zero_can_be_replaced(llama, llama_batches):
    for start in (True, "gaussian"):
        lora_one.initialize(adapted(llama, init_lora_weights=start), llama_batches, **ONE)
    refused("not a start", adapted(llama, init_lora_weights=False))


def test_a_merged_or_switched_off_adapter_is_refused(llama):
    peft_model = adapted(llama)
    peft_model.merge_adapter()
    refused(r"merged into the base weights; call unmerge_adapter\(\)", peft_model)
    peft_model.unmerge_adapter()
    with peft_model.disable_adapter():
        refused(r"switched off.*enable_adapter_layers\(\)", peft_model)


def test_an_adapter_that_is_not_active_is_refused_where_the_loss_is_measured(llama, llama_batches):
    peft_model = adapted(llama)
    peft_model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    before = snapshot(peft_model)
    with pytest.raises(lora_one.InputError, match=r"'second' is not active \(active: default\)"):
        lora_one.initialize(peft_model, llama_batches, adapter_name="second", **ONE)
    unchanged(peft_model, before)
    gradients = lora_one.estimate_gradients(peft_model, llama_batches, adapter_name="second")
    lora_one.initialize_adapters(peft_model, gradients, adapter_name="second", **ONE)


def test_weights_without_values_are_refused(llama):
    config = LoraConfig(target_modules=["q_proj"])
    refused("meta device", get_peft_model(llama, config, low_cpu_mem_usage=True))
    with torch.device("meta"):
        empty = tiny_llama()
    refused("meta device", get_peft_model(empty, config))
    for ask in (lora_one.estimate_gradients, partial(lora_one.allocate_ranks, rank=2)):
        with pytest.raises(lora_one.InputError, match="Embedding of this model has no values yet"):
            ask(empty, batches_for())


def test_an_offloaded_base_gives_its_gradient_but_not_its_weights(llama, llama_batches):
    expected = lora_one.estimate_gradients(llama, llama_batches)
    accelerate.cpu_offload(llama, execution_device="cpu")
    gradients = lora_one.estimate_gradients(llama, llama_batches)
    # Weights at other addresses: products are summed in another order.
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(lora_one.InputError, match="q_proj' is on the meta device, and pissa looks"):
        lora_one.allocate_ranks(llama, rank=2, method="pissa")


def test_variants_with_another_product_are_refused(llama):
    peft_model = adapted(llama, kasa_config=KasaConfig())
    refused("KasaLinearVariant, whose product is not s B A", peft_model)


class Picture(nn.Module):
    """A convolution, an embedding and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.words = nn.Embedding(7, 8)
        self.head = nn.Linear(8, 4)


def test_layers_that_are_not_linear_are_left_or_refused_by_choice():
    config = LoraConfig(r=2, target_modules=["conv", "words", "head"])
    peft_model = get_peft_model(Picture(), config)
    message = "2 adapted layers are not plain linear layers, first 'conv'.*'leave'"
    refused(message, peft_model, unsupported="refuse")
    refused("Did you mean 'refuse'", peft_model, unsupported="refused")
    report = lora_one.initialize_adapters(peft_model, {"head": torch.eye(4, 8)}, **ONE)
    assert report.left_to_peft == ["conv", "words"]
    assert [layer.name for layer in report.layers] == ["head"]


def test_a_method_that_changes_the_base_wants_it_for_itself(tmp_path, llama, llama_batches):
    shared = adapted(llama)
    shared.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    refused("which adapter 'second' uses too", shared, method="pissa")

    alone = adapted(llama)
    lora_one.initialize(alone, method="pissa")
    save_initial_state(alone, tmp_path / "start.safetensors")
    before = snapshot(shared)
    with pytest.raises(lora_one.InputError, match="which adapter 'second' uses too"):
        load_initial_state(shared, tmp_path / "start.safetensors")
    unchanged(shared, before)

    alone.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    alone.set_adapter("second")
    message = "'default' was started with pissa, which changed the base weights that adapter 'secon"
    refused(message, alone, adapter_name="second")
    with pytest.raises(lora_one.InputError, match=message):
        lora_one.export_adapter(alone, tmp_path / "a", adapter_name="second")


def test_an_adapter_that_is_added_again_is_a_new_one(tmp_path, llama, llama_batches):
    config = LoraConfig(r=2, target_modules=["q_proj"])

    def added_again(method):
        peft_model = adapted(llama)
        lora_one.initialize(peft_model, llama_batches, method=method)
        peft_model.delete_adapter("default")
        peft_model.add_adapter("default", config)
        peft_model.set_adapter("default")
        return peft_model

    lora_one.initialize(added_again("lora_one"), llama_batches, **ONE)
    changed = added_again("pissa")
    message = "a deleted adapter 'default' was started with pissa, which changed the base weights"
    refused(message, changed)
    with pytest.raises(lora_one.InputError, match=message):
        lora_one.export_adapter(changed, tmp_path / "a")


def test_an_adapter_that_is_multiplied_by_zero_is_refused(llama):
    refused("multiplied by 0.0; expected a positive number", adapted(llama, alpha=0))


def test_a_failed_search_of_gamma_leaves_the_model_alone(llama):
    peft_model = adapted(llama)
    before = snapshot(peft_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gamma, "mean_loss", lambda *_, **__: float("nan"))
        with pytest.raises(lora_one.InputError, match="no stable_gamma gives a finite loss"):
            lora_one.initialize(peft_model, batches_for(), stable_gamma="auto", **ONE)
    unchanged(peft_model, before)


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("width", [32, 160])  # decomposed by LAPACK, and by iteration
def test_a_weight_that_is_not_finite_is_named_before_anything_changes(method, width):
    peft_model = adapted(tiny_llama(hidden_size=width, intermediate_size=160))
    layer = peft_model.get_base_model().model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.base_layer.weight[3, 5] = float("nan")
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    message = r"weight of layer 'model\.layers\.1\.mlp\.down"
    with pytest.raises(lora_one.NonFiniteError, match=message):
        lora_one.initialize(peft_model, method=method)
    for name, value in peft_model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    if method == "pissa":
        with pytest.raises(lora_one.NonFiniteError, match=message):
            lora_one.allocate_ranks(peft_model.unload(), rank=2, method=method)
