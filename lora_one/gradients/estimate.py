"""All target layers' mean gradients as a dictionary."""

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_one.errors import not_finite
from lora_one.gradients.stream import stream_gradients
from lora_one.gradients.tokens import Batch
from lora_one.layers import TargetLayer, adapted_layers, plain_layers


def estimate_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    target_modules: Collection[str] | str | None = None,
    adapter_name: str = "default",
    train: bool = True,
    seed: int | None = None,
    strategy: str = "hold",
    memory_budget: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Return ``G = d loss / d W`` of every target layer, the mean over supervised tokens.

    The loss is the model's own, weighted over micro-batches by their supervised tokens, which is
    the training loss of all rows in one batch. A weight that is tied to another module (an
    ``lm_head`` that is also the embedding) gets the gradient of its use in the target layer
    only, because that is what the layer's adapter can change; a module that runs twice gets the
    sum of both.

    Args:
        model: a plain model, or a ``PeftModel`` whose adapted linear layers are the targets; its
            adapters are inactive meanwhile. Left exactly as it was found.
        batches: yields keyword arguments of ``model``, with labels.
        target_modules: for a plain model, as in PEFT: names or endings, a regular expression, or
            ``"all-linear"``, which is the default.
        adapter_name: for a ``PeftModel``, which adapter's layers.
        train: whether dropout is active; the published codes leave it active.
        seed: seeds dropout; the global random numbers are untouched either way.
        strategy: how several micro-batches are run, see ``lora_one.gradients.plan``. All
            gradients are held at the end in any case.
        memory_budget: for the strategies ``"auto"`` and ``"groups"``, in bytes.
        device: where the gradients are kept, ``"cpu"`` to save GPU memory; ``None`` for the
            layer's own device.

    Returns:
        Module name in the base model -> (out, in) in fp32 (fp64 for a fp64 model). Under
        ``torch.distributed`` each rank passes its share of the batches and gets the same result.

    Raises:
        InputError: if no layer is found, or the batches hold nothing to learn from.
        NonFiniteError: if a loss or a gradient is not finite.
    """
    gradients: dict[str, Tensor] = {}
    layers = _targets(model, target_modules, adapter_name)
    stream_gradients(
        model,
        batches,
        layers,
        gradients.__setitem__,
        train=train,
        seed=seed,
        strategy=strategy,
        memory_budget=memory_budget,
        device=device,
    )
    for name, gradient in gradients.items():
        check_finite(name, gradient)
    return {layer.name: gradients[layer.name] for layer in layers}


def check_finite(name: str, gradient: Tensor) -> None:
    """Raise ``NonFiniteError`` naming the layer if its gradient has an entry that is not finite."""
    if not torch.isfinite(gradient).all():
        raise not_finite(name)


def finite_norm(name: str, gradient: Tensor) -> float:
    """Return the Frobenius norm of a layer's gradient.

    Raises:
        NonFiniteError: for an entry that is not finite.
    """
    norm = float(gradient.norm())  # one pass tells zero from finite from the rest
    if not math.isfinite(norm):
        norm = float(gradient.double().norm())
    if not math.isfinite(norm):
        raise not_finite(name)
    return norm


def _targets(
    model: nn.Module, target_modules: Collection[str] | str | None, adapter_name: str
) -> Sequence[TargetLayer]:
    if isinstance(model, PeftModel):
        if target_modules is None:
            return adapted_layers(model, adapter_name)
        model = model.get_base_model()
    return plain_layers(model, "all-linear" if target_modules is None else target_modules)
