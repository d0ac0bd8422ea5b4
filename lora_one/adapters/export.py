"""A trained adapter as a plain LoRA for the untouched base, whatever the method.

A method with an offset trains ``W' = W - s B0 A0``, so what it adds to the untouched W is

    s B A - s B0 A0  =  s [B, -B0] [A; A0],

a plain LoRA of rank 2r, exactly. The exported configuration keeps ``use_rslora`` and whole-number
alphas: with twice the rank and twice ``lora_alpha`` PEFT's scaling becomes s' = s, or
s' = sqrt(2) s with rsLoRA, and the exported B is multiplied by ``s / s'``. On request the product
is cut to a smaller rank by its SVD.
"""

import copy
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

import lora_one
from lora_one.adapters.checks import check_base_is_untouched
from lora_one.adapters.stored import (
    ORIGIN,
    check_replaceable,
    pattern_key,
    rescaling,
    write_folder,
)
from lora_one.adapters.write import initial_state
from lora_one.errors import InputError
from lora_one.layers import base_name, check_adapter, dependent_layers, is_linear
from lora_one.numerics.methods import METHODS
from lora_one.numerics.products import truncated_factors

_PLAIN = {
    "init_lora_weights": True,
    "inference_mode": True,
    "lora_ga_config": None,
    "eva_config": None,
    "corda_config": None,
    "loftq_config": {},
}
_SHARED_FIELDS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)


@dataclass
class ExportReport:
    """An exported adapter.

    Attributes:
        path: of the folder.
        rank: of most layers.
        rank_range: the smallest and the largest rank of a layer.
        truncation_error: ``||P - P_r||_F / ||P||_F`` over all layers together, P being what the
            adapter adds to W; 0 without truncation.
        layer_errors: the same per layer; empty without truncation.
    """

    path: str
    rank: int
    rank_range: tuple[int, int]
    truncation_error: float
    layer_errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


@dataclass
class _Plain:
    """What one layer's adapter adds to the untouched W: ``s B A``, in at least fp32."""

    B: Tensor
    A: Tensor
    s: float
    alpha: float
    dtype: torch.dtype


def export_adapter(
    peft_model: PeftModel,
    path: str | Path,
    rank: int | None = None,
    *,
    adapter_name: str = "default",
) -> ExportReport:
    """Write the adapter to a folder that ``PeftModel.from_pretrained(base, path)`` loads.

    ``base`` is the untouched base model, whatever method started the adapter. The folder is
    written beside its final name and renamed, so it is either complete or absent; an adapter
    that is there already is replaced. Other trainable parts (``modules_to_save``, DoRA
    magnitudes, biases) are included. An AdaLoRA adapter becomes a plain LoRA of rank ``init_r``.

    Args:
        peft_model: trained or just started.
        path: folder to write.
        rank: cut every linear layer's product to this rank; ``None`` for the exact adapter. A
            DoRA magnitude is kept, so that with DoRA the cut changes directions only.
        adapter_name: which adapter.

    Returns:
        Where it is, its rank, and the error of the cut.

    Raises:
        InputError: for an unknown adapter, one over changed base weights (PEFT's own PiSSA, another
            adapter's offset), a rank below 1, or a folder that is no adapter's.
    """
    check_adapter(peft_model, adapter_name)
    check_base_is_untouched(peft_model, adapter_name)
    if rank is not None and rank < 1:
        raise InputError(f"rank must be at least 1, got {rank}.")
    path = Path(path)
    check_replaceable(path)
    config = peft_model.peft_config[adapter_name]
    use_rslora = getattr(config, "use_rslora", False)
    layers, errors, squares = {}, {}, [0.0, 0.0]
    for name, plain in _plain_layers(peft_model, adapter_name, rank is not None).items():
        if rank is not None:
            # Equal ranks and equal alphas, so that the cut adapter needs no patterns.
            B, A, tail, total = truncated_factors(plain.B, plain.A, rank)
            plain = replace(plain, B=B, A=A, alpha=config.lora_alpha)
            errors[name] = math.sqrt(tail / total) if total else 0.0
            squares = [squares[0] + plain.s**2 * tail, squares[1] + plain.s**2 * total]
        layers[name] = plain
    # Embedding weights belong to the base model; only their adapters are ours.
    tensors = get_peft_model_state_dict(
        peft_model, adapter_name=adapter_name, save_embedding_layers=False
    )
    tensors = {k: v for k, v in tensors.items() if not k.endswith(".lora_E")}
    for name, plain in layers.items():
        r = plain.B.shape[1]
        exported_s = plain.alpha / (math.sqrt(r) if use_rslora else r)
        key = f"base_model.model.{name}"
        for adalora_name in (f"{key}.lora_A", f"{key}.lora_B"):
            tensors.pop(adalora_name, None)
        tensors[f"{key}.lora_A.weight"] = plain.A.to(plain.dtype)
        ratio = rescaling(plain.s, exported_s)
        tensors[f"{key}.lora_B.weight"] = (plain.B * ratio).to(plain.dtype)
        bias = tensors.get(f"{key}.lora_B.bias")
        if bias is not None:  # s multiplies it too
            tensors[f"{key}.lora_B.bias"] = (_wide(bias) * ratio).to(bias.dtype)
    exported = _plain_config(peft_model, config, layers, adapter_name)
    write_folder(
        path,
        tensors,
        _header(peft_model, adapter_name),
        lambda folder: exported.save_pretrained(str(folder)),
    )
    error = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
    ranks = [exported.r, *exported.rank_pattern.values()]
    return ExportReport(str(path), exported.r, (min(ranks), max(ranks)), error, errors)


def _plain_layers(peft_model: PeftModel, adapter_name: str, truncates: bool) -> dict[str, _Plain]:
    """Return what every linear layer's adapter adds to the untouched base, as factors."""
    state = initial_state(peft_model, adapter_name)
    start = state.factors if state is not None and state.offset else {}
    dependent = dependent_layers(peft_model, adapter_name)
    layers = {}
    for wrapped_name, module in peft_model.get_base_model().named_modules():
        name = base_name(wrapped_name)
        if not isinstance(module, LoraLayer) or adapter_name not in module.lora_A:
            continue
        if not is_linear(module.get_base_layer()) or module in dependent:
            continue
        if isinstance(module, AdaLoraLayer):
            layers[name] = _from_adalora(module, adapter_name)
            continue
        A = module.lora_A[adapter_name].weight.detach()
        B = module.lora_B[adapter_name].weight.detach()
        dtype, alpha, s = A.dtype, module.lora_alpha[adapter_name], module.scaling[adapter_name]
        A, B = _wide(A), _wide(B)
        if name in start:
            B0, A0 = (_wide(factor).to(A.device) for factor in start[name])
            B0 = B0 * rescaling(state.scalings[name], s)  # the offset keeps the s of the start
            B, A = torch.cat([B, -B0], 1), torch.cat([A, A0], 0)
            alpha = alpha if truncates else 2 * alpha  # with the rank, so that s stays put
        layers[name] = _Plain(B, A, s, alpha, dtype)
    return layers


def _from_adalora(module: AdaLoraLayer, adapter_name: str) -> _Plain:
    """Return ``B (A * E)`` with AdaLoRA's scaling; lora_E (r, 1) is folded into A."""
    A, E = module.lora_A[adapter_name].detach(), module.lora_E[adapter_name].detach()
    B = _wide(module.lora_B[adapter_name].detach())
    # AdaLoRA divides by ranknum + 1e-5, see its forward pass.
    s = module.scaling[adapter_name] / (float(module.ranknum[adapter_name]) + 1e-5)
    return _Plain(B, _wide(A) * _wide(E), s, module.lora_alpha[adapter_name], A.dtype)


def _plain_config(
    peft_model: PeftModel, config: Any, layers: dict[str, _Plain], adapter_name: str
) -> LoraConfig:
    """Return the configuration of the exported adapter: commonest rank and alpha, exceptions."""
    if isinstance(config, LoraConfig) and config.peft_type == "LORA":
        exported = copy.deepcopy(config)
    else:
        exported = LoraConfig(**{name: getattr(config, name) for name in _SHARED_FIELDS})
    for name, value in _PLAIN.items():
        if hasattr(exported, name):
            setattr(exported, name, value)
    ranks, alphas = {}, {}
    for name, module in peft_model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in module.r:
            continue
        plain = layers.get(base_name(name))
        key = _pattern_name(base_name(name), module)
        # Embeddings, convolutions and their like keep what they were trained with.
        ranks[key] = plain.B.shape[1] if plain else module.r[adapter_name]
        alphas[key] = plain.alpha if plain else module.lora_alpha[adapter_name]
    exported.r = Counter(ranks.values()).most_common(1)[0][0]
    exported.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    exported.rank_pattern = {
        pattern_key(name, ranks): r for name, r in ranks.items() if r != exported.r
    }
    exported.alpha_pattern = {
        pattern_key(name, ranks): alpha
        for name, alpha in alphas.items()
        if alpha != exported.lora_alpha
    }
    if exported.base_model_name_or_path is None:
        exported.base_model_name_or_path = getattr(
            peft_model.get_base_model(), "name_or_path", None
        )
    return exported


def _pattern_name(name: str, module: LoraLayer) -> str:
    """Return the name for which PEFT looks up a layer's rank and alpha.

    For one of ``target_parameters`` it is the parameter's. Names that go on below a wrapped layer
    are those of more parameters, or of the output projection in ``nn.MultiheadAttention``.
    """
    name = name.partition(".base_layer")[0]
    return f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name


def _header(peft_model: PeftModel, adapter_name: str) -> dict[str, str]:
    """Return the safetensors header: how the adapter started, if this library started it."""
    state = initial_state(peft_model, adapter_name)
    if state is None:
        return {"format": "pt"}
    options = dict(state.metadata)
    if not METHODS[state.method].uses_scale:
        options = {k: v for k, v in options.items() if k not in ("scale", "stable_gamma")}
    origin = {"version": lora_one.__version__, "method": state.method, **options}
    return {"format": "pt", ORIGIN: json.dumps(origin)}


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
