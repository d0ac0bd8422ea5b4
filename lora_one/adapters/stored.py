"""A LoRA as PEFT stores it: a folder with a configuration and safetensors, no model.

Only torch and safetensors are needed. Pickled weights are never opened.
"""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lora_one.errors import InputError

SETTINGS = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ORIGIN = "lora_one"
"""Key in the safetensors header under which ``export_adapter`` says how the adapter started."""

# Beginnings of the ``init_lora_weights`` with which PEFT itself changes the base weights.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings with which a layer adds something else than s B A x.
_OTHER_PRODUCTS = (
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "monteclora_config",
)
_KINDS: dict[str, tuple[type, ...]] = {
    "base_model_name_or_path": (str,),
    "revision": (str,),
    "task_type": (str,),
    "target_modules": (str, list),
    "modules_to_save": (list,),
}
_WORDS = {str: "a text", list: "a list"}
UNCHECKED_BY_PEFT = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
    re.error,
)
"""What PEFT raises over settings and files that are odd in a way that it does not look for."""

PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])\.weight|embedding_([AB]))")


@dataclass(frozen=True)
class StoredLayer:
    """One layer's factors as they are stored.

    Attributes:
        name: in the base model.
        kind: ``linear``, ``embedding`` or ``convolution``.
        r: rank.
        alpha: ``lora_alpha`` of this layer.
        s: what multiplies the product.
        B: ``lora_B``, (out, r), or (out, r, 1, ...) of a convolution.
        A: ``lora_A``, (r, in), or (r, in, kernel...) of a convolution.
    """

    name: str
    kind: str
    r: int
    alpha: float
    s: float
    B: Tensor
    A: Tensor

    @property
    def keys(self) -> tuple[str, str]:
        """Names of B and A in the file."""
        if self.kind == "embedding":
            return tuple(f"{PREFIX}{self.name}.lora_embedding_{letter}" for letter in "BA")
        return tuple(f"{PREFIX}{self.name}.lora_{letter}.weight" for letter in "BA")

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """B (m, r) and A (r, n), a convolution's kernel laid out in n."""
        return self.B.flatten(1), self.A.flatten(1)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (m, n) of the product."""
        B, A = self.matrices
        return B.shape[0], A.shape[1]


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA in a folder.

    Attributes:
        path: The folder.
        config: ``adapter_config.json``, every key.
        layers: In the order of the file.
        others: What is stored beside the factors (modules trained in full, DoRA's magnitudes,
            biases), by the name in the file.
        header: The metadata of the safetensors file.
    """

    path: Path
    config: Mapping[str, Any]
    layers: list[StoredLayer]
    others: Mapping[str, Tensor]
    header: Mapping[str, str]

    @property
    def changes_base(self) -> bool:
        """Whether the factors belong to a base that PEFT's own start has changed."""
        return changes_base(self.config.get("init_lora_weights", True))

    @property
    def origin(self) -> dict[str, Any] | None:
        """How the adapter started, if ``export_adapter`` wrote it.

        Raises:
            InputError: it is damaged.
        """
        if ORIGIN not in self.header:
            return None
        try:
            origin = json.loads(self.header[ORIGIN])
            return {**origin, "method": origin["method"], "version": origin["version"]}
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: what the header of {WEIGHTS} says under '{ORIGIN}' cannot be read: "
                f"{error!r}"
            ) from None


def changes_base(init_lora_weights: bool | str) -> bool:
    """Whether PEFT changes the base weights when it starts an adapter like this."""
    return str(init_lora_weights).lower().startswith(_CHANGES_BASE)


def read_stored(path: str | Path) -> StoredAdapter:
    """Read an adapter folder.

    Raises:
        InputError: no such folder, no LoRA in it, or one that is damaged or pickled.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{path}: there is no such folder. Expected a PEFT adapter's folder.")
    config = _read_config(folder)
    tensors, header = _read_weights(folder)
    factors: dict[tuple[str, bool], dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key)
        if found is None:
            others[key] = tensor
            continue
        name, letter, of_embedding = found.groups()
        pair = factors.setdefault((name.removeprefix(PREFIX), letter is None), {})
        pair[letter or of_embedding] = tensor
    if not factors:
        raise InputError(f"{folder}: {WEIGHTS} holds no lora_A and lora_B.")
    layers = [_layer(folder, config, *key, pair) for key, pair in factors.items()]
    return StoredAdapter(folder, config, layers, others, header)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    if not file.is_file():
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise InputError(f"{folder}: there is no {SETTINGS}, so this is no PEFT adapter ({held}).")
    try:
        config = json.loads(file.read_text())
        kind = config["peft_type"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read as an adapter's settings: {error!r}") from None
    for key, kinds in _KINDS.items():
        if config.get(key) is not None and not isinstance(config[key], kinds):
            expected = " or ".join(_WORDS[kind] for kind in kinds)
            raise InputError(f"{file}: {key} must be {expected}, got {config[key]!r}.")
    if kind != "LORA":
        raise InputError(
            f"{folder} holds a {kind} adapter; expected LORA. lora_one.export_adapter writes a "
            "trained AdaLoRA as a plain LoRA."
        )
    others = [name for name in _OTHER_PRODUCTS if config.get(name)]
    if others:
        raise InputError(
            f"{folder}: {others[0]} makes a layer add something else than s B A x, which is not "
            "read here; use the adapter with PEFT."
        )
    for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        by_layer = config.get(pattern) or {}
        if not isinstance(by_layer, dict):
            raise InputError(
                f"{file}: {pattern} must map layers to numbers, as in "
                f'{{"q_proj": 4}}, got {by_layer!r}.'
            )
        for name, value in ((key, config.get(key)), *by_layer.items()):
            if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                where = key if name == key else f"'{name}' in {pattern}"
                raise InputError(f"{file}: {where} must be a finite number, got {value!r}.")
    return config


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = folder / WEIGHTS.replace(".safetensors", ".bin")
        raise InputError(
            f"{folder}: there is no {WEIGHTS}."
            + (
                f" {pickled.name} is a pickle, which can run code and is not opened here: load it "
                "with PEFT where you trust it, and save_pretrained() writes safetensors."
                if pickled.is_file()
                else ""
            )
        )
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no dict)
            return tensors, stored.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} is damaged: {error}") from None


def _layer(
    folder: Path, config: Mapping[str, Any], name: str, embedding: bool, pair: dict[str, Tensor]
) -> StoredLayer:
    if len(pair) != 2:
        raise InputError(f"{folder}: layer '{name}' has lora_{'/'.join(pair)} only.")
    B, A = pair["B"], pair["A"]
    r = pattern_value(config.get("rank_pattern"), name, config["r"])
    if min(B.ndim, A.ndim) < 2 or not B.shape[1] == A.shape[0] == r:
        raise InputError(
            f"{folder}: layer '{name}' holds B {tuple(B.shape)} and A {tuple(A.shape)}, expected "
            f"B (out, {r}) and A ({r}, in) for its rank {r}."
        )
    kind = "embedding" if embedding else "linear" if A.ndim == 2 else "convolution"
    alpha = pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"])
    s = scaling(alpha, r, use_rslora=bool(config.get("use_rslora")))
    return StoredLayer(name, kind, r, alpha, s, B, A)


def scaling(alpha: float, r: int, *, use_rslora: bool) -> float:
    """Return ``s = alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def pattern_value(pattern: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """Return the value of PEFT's ``rank_pattern`` or ``alpha_pattern`` for a layer.

    PEFT's rule: a key is a regular expression for the end of the name from a dot on, and the first
    that fits counts.

    Raises:
        InputError: if a key is no regular expression.
    """
    for key, value in (pattern or {}).items():
        try:
            fits = re.fullmatch(rf"(.*\.)?({key})", name)
        except re.error as error:
            raise InputError(
                f"{key!r} in the adapter's rank_pattern or alpha_pattern is no regular expression: "
                f"{error.msg}."
            ) from None
        if fits:
            return value
    return otherwise


def pattern_key(name: str, names: Collection[str]) -> str:
    """Return a key of ``rank_pattern`` and ``alpha_pattern`` that one of the layers alone fits.

    It is the layer's name, as PEFT writes it, unless that is also the end of another layer's.
    """
    key = re.escape(name).replace(r"\.", ".")
    fits = re.compile(rf"(.*\.)?({key})").fullmatch
    alone = sum(fits(other) is not None for other in names) == 1
    return key if alone else f"^{re.escape(name)}"


def rescaling(s: float, new_s: float) -> float:
    """Return what B is multiplied by, so that ``s B A`` stays when s changes.

    Raises:
        InputError: if ``new_s`` is zero and s is not.
    """
    if s == new_s:
        return 1.0
    if new_s == 0:
        raise InputError(
            "lora_alpha is 0, but alpha_pattern or the layer's scaling is not, so the product "
            "cannot be kept; expected another lora_alpha."
        )
    return s / new_s


def check_replaceable(path: Path) -> None:
    """Raise ``InputError`` if something other than an adapter is there already."""
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / SETTINGS).is_file()):
        raise InputError(f"{path} exists and holds no adapter; choose another folder.")


def _in_order(file: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted: the same adapter is the same bytes.

    The library writes them in the order of a hash table, which is another one each time. The file
    is the length of the header (8 bytes, little endian), the header (JSON, padded with spaces to a
    multiple of 8) and the tensors.
    """
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + file[8 + size :]


def write_folder(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    save_settings: Callable[[Path], object],
) -> None:
    """Write an adapter beside its final name, then move it there, so that it is whole or absent.

    Args:
        path: The folder, or a link to it; an adapter that is there already is replaced.
        tensors: What ``adapter_model.safetensors`` holds.
        header: Its metadata.
        save_settings: Writes the settings into the folder that it is given.
    """
    path = path.resolve()  # else a link would be replaced, not what it leads to
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.new"
    previous = path.parent / f".{path.name}.{os.getpid()}.old"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        copies = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        (temporary / WEIGHTS).write_bytes(_in_order(save(copies, metadata=dict(header))))
        save_settings(temporary)
        if path.exists():
            path.rename(previous)
        temporary.rename(path)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
