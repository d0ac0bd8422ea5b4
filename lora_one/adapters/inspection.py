"""What is inside a stored adapter: settings, sizes, and how much each layer's product adds to W."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_one.adapters.stored import StoredAdapter, StoredLayer
from lora_one.errors import InputError, nearest
from lora_one.numerics.products import effective_rank, product_singular_values

_SHOWN_VALUES = 4


@dataclass(frozen=True)
class Spectrum:
    """One layer's product ``s B A``.

    Attributes:
        name: of the layer in the base model.
        kind: ``linear``, ``embedding`` or ``convolution``.
        shape: of the product, (out, in); of an embedding (features, words).
        rank: r.
        alpha: ``lora_alpha``.
        scaling: s.
        norm: ``||s B A||_F``.
        effective_rank: of the product, see ``lora_one.numerics.products``.
        singular_values: of the product, descending.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    scaling: float
    norm: float
    effective_rank: float
    singular_values: list[float]


def spectrum(layer: StoredLayer) -> Spectrum:
    """Look at one layer's product, in fp64 and without forming it.

    Raises:
        InputError: for a factor that is not finite.
    """
    B, A = layer.matrices
    if not (B.isfinite().all() and A.isfinite().all()):
        raise InputError(f"layer '{layer.name}' holds values that are infinite or not a number.")
    S = layer.s * product_singular_values(B, A)
    return Spectrum(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        rank=layer.r,
        alpha=layer.alpha,
        scaling=layer.s,
        norm=float(S.norm()),
        effective_rank=effective_rank(S),
        singular_values=S.tolist(),
    )


def select(layers: Iterable[StoredLayer], pattern: str | None) -> list[StoredLayer]:
    """Return the layers in whose name a regular expression is found.

    Raises:
        InputError: no layer, or no regular expression.
    """
    layers = list(layers)
    if pattern is None:
        return layers
    try:
        found = [layer for layer in layers if re.search(pattern, layer.name)]
    except re.error as error:
        raise InputError(f"--layers {pattern} is no regular expression: {error}") from None
    if not found:
        endings = sorted({layer.name.rpartition(".")[2] for layer in layers})
        raise InputError(
            f"--layers {pattern} is found in no layer's name.{nearest(pattern, endings)} "
            f"Endings: {', '.join(endings)}."
        )
    return found


def describe(adapter: StoredAdapter, pattern: str | None = None) -> dict[str, Any]:
    """Return everything about an adapter as plain values, ready for JSON.

    Args:
        adapter: As it was read.
        pattern: Regular expression that chooses layers; the rest is about all of them.
    """
    config = adapter.config
    stored = [tensor for layer in adapter.layers for tensor in (layer.B, layer.A)]
    stored += adapter.others.values()
    spectra = [spectrum(layer) for layer in select(adapter.layers, pattern)]
    return {
        "path": str(adapter.path),
        "base_model": config.get("base_model_name_or_path"),
        "base_revision": config.get("revision"),
        "task_type": config.get("task_type"),
        "origin": adapter.origin,
        "init_lora_weights": config.get("init_lora_weights", True),
        "changes_base": adapter.changes_base,
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "bias": config.get("bias", "none"),
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
        "ranks": _counted(layer.r for layer in adapter.layers),
        "alphas": _counted(layer.alpha for layer in adapter.layers),
        "scalings": _counted(layer.s for layer in adapter.layers),
        "parameters": sum(tensor.numel() for tensor in stored),
        "bytes": sum(tensor.nbytes for tensor in stored),
        "dtypes": _counted(str(tensor.dtype).removeprefix("torch.") for tensor in stored),
        "beside_factors": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in adapter.others.items()
        },
        "layers": [asdict(entry) for entry in sorted(spectra, key=lambda entry: -entry.norm)],
    }


def render(facts: dict[str, Any]) -> str:
    """Lay ``describe``'s facts out for a terminal: settings, then a line per layer by norm."""
    lines = [f"{name:<11}{value}" for name, value in _settings(facts) if value]
    rows = [("layer", "out x in", "r", "||s B A||", "eff. rank", "singular values")]
    for layer in facts["layers"]:
        values = layer["singular_values"]
        more = " ..." if len(values) > _SHOWN_VALUES else ""
        rows.append(
            (
                layer["name"],
                "{} x {}".format(*layer["shape"]),
                str(layer["rank"]),
                f"{layer['norm']:.4g}",
                f"{layer['effective_rank']:.2f}",
                " ".join(f"{value:.3g}" for value in values[:_SHOWN_VALUES]) + more,
            )
        )
    return "\n".join([*lines, "", *aligned(rows)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines: first and last column to the left, numbers between to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            f"{cell:<{width}}" if at in (0, last) else f"{cell:>{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _settings(facts: dict[str, Any]) -> list[tuple[str, str]]:
    revision = facts["base_revision"]
    divisor = "sqrt(r)" if facts["use_rslora"] else "r"
    targets = facts["target_modules"]
    beside = sorted(facts["beside_factors"])
    return [
        ("adapter", facts["path"]),
        ("base", (facts["base_model"] or "not said") + (f" at {revision}" if revision else "")),
        ("task", facts["task_type"] or ""),
        ("method", _method(facts)),
        ("kind", _kind(facts)),
        ("rank", _spread(facts["ranks"])),
        ("alpha", _spread(facts["alphas"])),
        ("scaling", f"s = alpha / {divisor}: {_spread(facts['scalings'])}"),
        ("targets", targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))),
        ("in full", ", ".join(facts["modules_to_save"] or ())),
        ("beside", f"{len(beside)} more tensors, first {beside[0]}" if beside else ""),
        ("size", f"{facts['parameters']:,} parameters, {facts['bytes'] / 1e6:.2f} MB"),
        ("dtype", _spread(facts["dtypes"], of="tensors")),
    ]


def _method(facts: dict[str, Any]) -> str:
    origin, start = facts["origin"], facts["init_lora_weights"]
    if origin is not None:
        options = {key: origin[key] for key in ("scale", "stable_gamma") if key in origin}
        details = "".join(f", {key} {value}" for key, value in options.items())
        return f"{origin['method']}{details} (lora-one {origin['version']})"
    if facts["changes_base"]:
        return f"PEFT's {start}: not for the untouched base, PEFT changes it when it loads this"
    return "not recorded" if start is True else f"PEFT's {start}"


def _kind(facts: dict[str, Any]) -> str:
    kind = "rsLoRA" if facts["use_rslora"] else "LoRA"
    if facts["use_dora"]:
        kind += " with DoRA (the norms below are before its magnitudes)"
    return kind if facts["bias"] == "none" else f"{kind}, bias {facts['bias']}"


def _counted(values: Iterable[Any]) -> dict[str, int]:
    """Return how often each value occurs, commonest first, keyed for JSON."""
    counts = Counter(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return dict(counts.most_common())


def _spread(counts: dict[str, int], of: str = "layers") -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count} {of})" for value, count in counts.items())
