"""Merge a trained adapter into the base weights, in fp32, and check that nothing moved."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_one.adapters.checks import parameter_uses
from lora_one.errors import InputError
from lora_one.gradients.tokens import to_device
from lora_one.layers import check_adapter, is_linear, is_quantised, lora_layers, model_device


@torch.no_grad()
def merge_adapter(
    peft_model: PeftModel,
    batch: Mapping[str, Any] | None = None,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-3,
) -> nn.Module:
    """Return the base model with the adapter merged; ``peft_model`` is used up.

    The weights are ``W + s B A`` (with DoRA's magnitude where there is one), computed in fp32 and
    rounded once to ``dtype``. A weight that was tied to another module's (an ``lm_head`` that is
    also the embedding) changes in the adapted module only; PEFT notes that in the configuration.

    Args:
        peft_model: the trained model.
        batch: keyword arguments of the model; if given, its logits before and after the merge
            are compared.
        adapter_name: which adapter; it need not be the active one, nor be switched on.
        dtype: of the merged model; fp32 loses nothing.
        tolerance: largest difference allowed between the logits, relative to the largest logit.
            A merge to bf16 needs about 1e-1.

    Raises:
        InputError: for a quantised base, a model without the adapter, and an adapter with values
            that are not finite.
        RuntimeError: if the logits differ by more than the tolerance.
    """
    check_adapter(peft_model, adapter_name)
    layers = lora_layers(peft_model, adapter_name)
    if not layers:
        raise InputError(
            f"no layer carries a LoRA adapter named '{adapter_name}'; expected one made from a "
            "LoraConfig."
        )
    check_unquantised(layers)
    peft_model.eval().float()
    # The logits before and modules_to_save are those of the active adapter.
    peft_model.base_model.enable_adapter_layers()
    peft_model.set_adapter(adapter_name)
    before = None if batch is None else logits_of(peft_model, batch)
    _untie(peft_model)
    try:
        merged = peft_model.merge_and_unload(safe_merge=True, adapter_names=[adapter_name])
    except ValueError as error:  # PEFT's word for merged weights that are not finite
        raise InputError(f"adapter '{adapter_name}' cannot be merged: {error}") from None
    merged = merged.to(dtype)
    if before is not None:
        check_same_logits(before, logits_of(merged, batch), tolerance)
    return merged


def check_unquantised(layers: Mapping[str, LoraLayer]) -> None:
    """Raise ``InputError`` for a quantised layer, before ``float()`` hides that it is one."""
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if is_linear(base) and is_quantised(base):
            raise InputError(
                f"layer '{name}' is quantised; export the adapter and merge it into the "
                "unquantised base model."
            )


@torch.no_grad()
def logits_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the model's logits of a batch, wherever the model is."""
    return model(**to_device(batch, model_device(model))).logits


def check_same_logits(before: Tensor, after: Tensor, tolerance: float) -> float:
    """Return the largest difference between logits, relative to the largest logit.

    Raises:
        RuntimeError: if it is more than the tolerance.
    """
    difference = float((after.to(before) - before).abs().max() / before.abs().max())
    if not difference <= tolerance:
        raise RuntimeError(
            f"merging changed the logits by {difference:.2e} of the largest, more than the "
            f"tolerance of {tolerance:.2e}."
        )
    return difference


def _untie(peft_model: PeftModel) -> None:
    """Give every adapted module a weight of its own, since PEFT merges in place."""
    uses = parameter_uses(peft_model)
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            weight = getattr(base, "weight", None)
            if weight is not None and uses[id(weight)] > 1:
                base.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
