"""Other forms of a stored adapter: of a smaller rank, of one rank for all layers, without rsLoRA.

The product ``s B A`` of every layer stays what it was, but for the rank that is cut off. Modules
trained in full, magnitudes and biases are kept.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_one.adapters.stored import (
    SETTINGS,
    StoredAdapter,
    StoredLayer,
    check_replaceable,
    pattern_key,
    rescaling,
    scaling,
    write_folder,
)
from lora_one.errors import InputError
from lora_one.numerics.products import truncated_factors

_CARD = "README.md"


@dataclass(frozen=True)
class Truncation:
    """What a cut to a rank lost, as ``||P - P_r||_F / ||P||_F`` of ``P = s B A``.

    Attributes:
        error: over all layers together.
        layer_errors: by layer.
    """

    error: float
    layer_errors: Mapping[str, float]


def truncate(adapter: StoredAdapter, rank: int) -> tuple[StoredAdapter, Truncation]:
    """Cut every layer's product to a rank, by its SVD, and give all layers one alpha.

    With DoRA the cut changes directions only, since the magnitudes are kept.

    Raises:
        InputError: for a rank below 1, or factors that belong to a base that PEFT changes.
    """
    if rank < 1:
        raise InputError(f"the rank must be at least 1, got {rank}.")
    _check_plain(adapter)
    alpha = adapter.config["lora_alpha"]
    layers, errors, tails, totals = [], {}, 0.0, 0.0
    for layer in adapter.layers:
        B, A, tail, total = truncated_factors(*layer.matrices, rank)
        layers.append(_with_factors(adapter, layer, B, A, alpha))
        errors[layer.name] = math.sqrt(tail / total) if total else 0.0
        tails, totals = tails + layer.s**2 * tail, totals + layer.s**2 * total
    error = math.sqrt(tails / totals) if totals else 0.0
    return _of_layers(adapter, layers), Truncation(error, errors)


def make_uniform(adapter: StoredAdapter) -> StoredAdapter:
    """Give all layers the largest rank and the commonest alpha: no patterns are left.

    Factors of a smaller rank are padded with zeros, and B is multiplied by ``s / s'``, which a
    half-precision adapter rounds once.

    Raises:
        InputError: for factors that belong to a base that PEFT changes.
    """
    _check_plain(adapter)
    rank = max(layer.r for layer in adapter.layers)
    alpha = _commonest(layer.alpha for layer in adapter.layers)
    layers = []
    for layer in adapter.layers:
        if (layer.r, layer.alpha) == (rank, alpha):
            layers.append(layer)
            continue
        B, A = layer.matrices
        missing = rank - layer.r
        padded = pad(B.double(), (0, missing)), pad(A.double(), (0, 0, 0, missing))
        layers.append(_with_factors(adapter, layer, *padded, alpha))
    return _of_layers(adapter, layers)


def fold_rslora(adapter: StoredAdapter) -> StoredAdapter:
    """Say the same without rsLoRA: ``alpha' = alpha sqrt(r)``, so that ``alpha' / r`` is s.

    The factors are untouched, bit for bit.

    Raises:
        InputError: for factors that belong to a base that PEFT changes.
    """
    _check_plain(adapter)
    if not adapter.config.get("use_rslora"):
        return adapter
    layers = [replace(layer, alpha=_tidy(layer.s * layer.r)) for layer in adapter.layers]
    config = {**adapter.config, "use_rslora": False}
    return _of_layers(replace(adapter, config=config), layers)


def write_stored(adapter: StoredAdapter, path: Path, note: str) -> None:
    """Write an adapter's folder; its card comes along with a note on what was done.

    Raises:
        InputError: something other than an adapter is there already.
    """
    check_replaceable(path)
    factors = [
        pair
        for layer in adapter.layers
        for pair in zip(layer.keys, (layer.B, layer.A), strict=True)
    ]
    card = adapter.path / _CARD
    text = card.read_bytes() if card.is_file() else None

    def save_settings(folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(adapter.config, indent=2, sort_keys=True))
        if text is not None:
            (folder / _CARD).write_bytes(text.rstrip() + f"\n\n{note}\n".encode())

    write_folder(path, {**adapter.others, **dict(factors)}, adapter.header, save_settings)


def _check_plain(adapter: StoredAdapter) -> None:
    if adapter.changes_base:
        start = adapter.config["init_lora_weights"]
        raise InputError(
            f"{adapter.path} has init_lora_weights='{start}': PEFT changes the base weights by "
            "this rank and scaling when it loads the adapter, so neither can be changed. Convert "
            "it first, by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)."
        )


def _with_factors(
    adapter: StoredAdapter, layer: StoredLayer, B: Tensor, A: Tensor, alpha: float
) -> StoredLayer:
    """Return the layer with B (m, r') and A (r', n) in fp64 for its s, and with r' and alpha.

    B is rescaled for the scaling that follows from r' and alpha, then both are rounded once.
    """
    rank = B.shape[1]
    s = scaling(alpha, rank, use_rslora=bool(adapter.config.get("use_rslora")))
    B = (B * rescaling(layer.s, s)).to(layer.B.dtype)
    B = B.reshape(layer.B.shape[0], rank, *layer.B.shape[2:])
    A = A.to(layer.A.dtype).reshape(rank, *layer.A.shape[1:])
    return replace(layer, r=rank, alpha=alpha, s=s, B=B, A=A)


def _of_layers(adapter: StoredAdapter, layers: list[StoredLayer]) -> StoredAdapter:
    """Return the adapter with these layers: settings and biases that follow from them."""
    rank = _commonest(layer.r for layer in layers)
    alpha = _commonest(layer.alpha for layer in layers)
    names = [layer.name for layer in layers]
    config = {
        **adapter.config,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_key(x.name, names): x.r for x in layers if x.r != rank},
        "alpha_pattern": {pattern_key(x.name, names): x.alpha for x in layers if x.alpha != alpha},
    }
    others = dict(adapter.others)
    for old, new in zip(adapter.layers, layers, strict=True):
        key = old.keys[0].replace(".weight", ".bias")
        if key in others:  # the bias of lora_B, which s multiplies too
            bias = others[key].to(torch.float64) * rescaling(old.s, new.s)
            others[key] = bias.to(others[key].dtype)
    return replace(adapter, config=config, layers=layers, others=others)


def _commonest(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _tidy(value: float) -> float | int:
    """Return a whole number as ``int``, up to the rounding of a square root."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value
