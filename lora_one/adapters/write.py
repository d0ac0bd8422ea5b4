"""From a pure initialiser's factors to the written adapter: round, offset, magnitude, remember.

The order matters and is the same everywhere: the factors are clipped if asked, then rounded to
the adapter's dtype, and the offset ``s B0 A0`` is computed in fp32 from the rounded factors and
taken from the base weight, which is rounded once. So the start differs from the untouched base by
the rounding of the base weight alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor

from lora_one.errors import InputError, nearest
from lora_one.layers import (
    AdaptedLayer,
    base_weight,
    write_base_weight,
)
from lora_one.numerics.factors import SCALES, Factors
from lora_one.numerics.methods import METHODS, Method
from lora_one.numerics.precision import full_precision
from lora_one.sharding import reshard

_STATE = "lora_one_initial_state"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to initialise; checked on construction."""

    method: str
    scale: str = "stable"
    stable_gamma: float = 128.0
    norm_clip: bool = False
    seed: int = 0
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(
                f"unknown method '{self.method}'.{nearest(self.method, METHODS)} "
                f"Methods: {', '.join(METHODS)}."
            )
        if self.scale not in SCALES:
            raise InputError(
                f"unknown scale '{self.scale}'.{nearest(self.scale, SCALES)} "
                f"Scales: {', '.join(SCALES)}."
            )
        if not isinstance(self.stable_gamma, Real) or not self.stable_gamma > 0:
            raise InputError(f"stable_gamma must be a positive number, got {self.stable_gamma!r}.")

    @property
    def spec(self) -> Method:
        """The method's entry in the table."""
        return METHODS[self.method]

    @property
    def reads_weight(self) -> bool:
        """Whether the factors depend on W."""
        uses_weight_scale = self.spec.uses_scale and self.scale == "weightS"
        return self.spec.needs == "weight" or uses_weight_scale or self.norm_clip


@dataclass
class InitialState:
    """The start of one adapter, kept on the model for export and resume.

    Attributes:
        method: that wrote it.
        offset: whether ``s B0 A0`` was taken from the base weights.
        metadata: options as plain values.
        factors: layer name -> (B0, A0) on the CPU, in the dtype of the adapter.
        scalings: layer name -> s at the start, which PEFT lets a user change afterwards.
    """

    method: str
    offset: bool
    metadata: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)


def initial_state(peft_model: PeftModel, adapter_name: str = "default") -> InitialState | None:
    """Return how the adapter started, or None if it was not started by this library.

    An adapter that was deleted, and added again under its name, is another one.
    """
    state = initial_states(peft_model).get(adapter_name)
    if state is None or not state.factors:
        return state
    layers = (module for module in peft_model.modules() if isinstance(module, LoraLayer))
    factors = (layer.lora_A[adapter_name] for layer in layers if adapter_name in layer.lora_A)
    return state if any(getattr(A, _STATE, None) is state for A in factors) else None


def initial_states(peft_model: PeftModel) -> Mapping[str, InitialState]:
    """Return the start of every adapter that this library started, deleted ones too, by name."""
    return getattr(peft_model.base_model, _STATE, {})


def remember(
    peft_model: PeftModel, adapter_name: str, state: InitialState, layers: list[AdaptedLayer]
) -> None:
    """Keep the initial state on the model, outside its ``state_dict``.

    It also marks the layers' ``lora_A``, which PEFT drops when it deletes the adapter. Unlike the
    identity of a parameter, a mark comes along when the model is copied, pickled or sharded.
    """
    states = {**initial_states(peft_model), adapter_name: state}
    setattr(peft_model.base_model, _STATE, states)
    for layer in layers:
        setattr(layer.peft_layer.lora_A[adapter_name], _STATE, state)


@torch.no_grad()
def write_factors(layer: AdaptedLayer, B: Tensor, A: Tensor, dtype: torch.dtype | None) -> None:
    """Store B and A as the adapter's weights, rounded to ``dtype`` or the dtype they have."""
    for parameter, value in ((layer.B, B), (layer.A, A)):
        value = value.detach().to(parameter.device, dtype or parameter.dtype)
        if value.dtype == parameter.dtype:
            parameter.copy_(value)
        else:
            parameter.data = value.clone().contiguous()
    torch.clear_autocast_cache()  # of copies in half precision, where the caller is in autocast


@torch.no_grad()
def subtract_offset(layer: AdaptedLayer) -> None:
    """``W <- W - s B A`` with the adapter's present, rounded factors; fp32, rounded once."""
    W = base_weight(layer.module)
    dtype = torch.promote_types(W.dtype, torch.float32)
    with full_precision(W.device):
        offset = layer.s * (layer.B.detach().to(dtype) @ layer.A.detach().to(dtype))
    write_base_weight(layer, W.to(dtype) - offset.to(W.device))


@torch.no_grad()
def reset_dora_magnitude(layer: AdaptedLayer) -> None:
    """Set DoRA's magnitude to the row norms of ``W + s B A``, so that its factor starts at one.

    W is the present (possibly offset) base weight: the start is exactly the untouched W for
    methods with an offset, and ``W + s B0 A0`` for those without.
    """
    magnitudes = layer.peft_layer.lora_magnitude_vector
    if layer.adapter_name not in magnitudes:
        return
    dora: DoraLinearLayer = magnitudes[layer.adapter_name]
    old = dora.weight
    with full_precision(old.device):
        dora.update_layer(base_layer=layer.module, lora_A=layer.A, lora_B=layer.B, scaling=layer.s)
    old.copy_(dora.weight)
    dora.weight = old


def start_adapter(
    peft_model: PeftModel,
    adapter_name: str,
    layers: list[AdaptedLayer],
    starts: Mapping[str, Factors],
    options: Options,
) -> None:
    """Write all layers' factors, take the offsets, set magnitudes and remember the start."""
    state = InitialState(options.method, options.spec.offset, _metadata(options))
    reshard(peft_model)  # FSDP2 keeps the outermost weights whole after a forward pass
    started = [layer for layer in layers if layer.name in starts]
    for layer in started:
        factors = starts[layer.name]
        write_factors(layer, factors.B, factors.A, options.dtype)
        if options.spec.offset:
            subtract_offset(layer)
        reset_dora_magnitude(layer)
        state.factors[layer.name] = (layer.B.detach().cpu().clone(), layer.A.detach().cpu().clone())
        state.scalings[layer.name] = layer.s
    remember(peft_model, adapter_name, state, started)


def _metadata(options: Options) -> dict[str, Any]:
    return {
        "scale": options.scale,
        "stable_gamma": options.stable_gamma,
        "norm_clip": options.norm_clip,
        "seed": options.seed,
    }
