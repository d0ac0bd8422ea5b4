"""Where a number stopped being finite: in a weight, in a layer's output, or in a gradient."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_one.sharding import own_part

NOTHING_FOUND = "weights, outputs and gradients are finite now"


def locate(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Name the first thing that is not finite, in the order cause before effect.

    Args:
        model: The model, as it was when the loss came out infinite or NaN.
        inputs: The batch that it came out on.
    """
    for name, parameter in model.named_parameters():
        # Of a sharded weight the own rows: not all ranks need be here.
        if not torch.isfinite(own_part(parameter)).all():
            return f"the weight of {_layer(name)} is not finite"
    name = _first_bad_output(model, inputs)
    if name is not None:
        return f"the output of {name} is not finite"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(own_part(parameter.grad)).all():
            return f"the gradient of {_layer(name)} is not finite"
    return NOTHING_FOUND


@torch.no_grad()
def _first_bad_output(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(_layer(name))

        return hook

    hooks = [m.register_forward_hook(look(n)) for n, m in model.named_modules()]
    try:
        model(**{key: value for key, value in inputs.items() if key != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _layer(name: str) -> str:
    return name.removeprefix("module.").removeprefix("base_model.model.")
