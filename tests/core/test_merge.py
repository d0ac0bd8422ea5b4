"""A merged model gives the logits of the base with the adapter that was named."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import lora_one
from lora_one.adapters.merge import merge_adapter

from .tiny import adapted, batches_for, logits, perturb, tiny_llama


def two_adapters(saved):
    """Return a model on which ``default`` is active, and the logits of its ``second``."""
    model = adapted(tiny_llama(), modules_to_save=saved[0])
    model.add_adapter(
        "second", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved[1])
    )
    model.set_adapter("second")
    perturb(model, size=0.1)
    expected = logits(model, batches_for()[0])
    model.set_adapter("default")
    perturb(model, size=0.2)
    return model, expected


@pytest.mark.parametrize("batch", [None, batches_for()[0]])
@pytest.mark.parametrize(
    "saved", [(None, None), (["lm_head"], ["lm_head"]), (["lm_head"], None), (None, ["lm_head"])]
)
@pytest.mark.parametrize(
    "state",
    [None, lambda model: model.merge_adapter(), lambda model: model.disable_adapter_layers()],
)
def test_the_named_adapter_is_merged_with_its_own_modules(state, saved, batch):
    model, expected = two_adapters(saved)
    if state is not None:
        state(model)
    merged = merge_adapter(model, batch, adapter_name="second")
    # Rounding of one merge, and of taking back another.
    torch.testing.assert_close(logits(merged, batches_for()[0]), expected, rtol=0, atol=2e-5)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.convolution(x).relu().mean((2, 3)))


def test_an_adapter_of_convolutions_alone_is_merged():
    model = get_peft_model(Pictures(), LoraConfig(r=2, target_modules=["convolution"]))
    perturb(model, size=0.3)
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    torch.testing.assert_close(merge_adapter(model)(x), expected)


def test_only_lora_is_merged():
    model = get_peft_model(
        tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    with pytest.raises(lora_one.InputError, match="no layer carries a LoRA adapter"):
        merge_adapter(model)
    with pytest.raises(lora_one.InputError, match="no adapter named 'x'"):
        merge_adapter(adapted(tiny_llama()), adapter_name="x")
