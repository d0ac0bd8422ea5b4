"""An initialisation that is paid once: same model, rows, options and code give the stored start.

A sweep over learning rates or training seeds starts every run alike. The key is a hash of all
that decides the start: a checksum of the base weights, the model's configuration and dropout,
every tensor of the init batches, the options, the adapted layers and the versions of this library
and torch. Nothing is looked up by name, so a changed model under an old name is noticed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

import lora_one
from lora_one.adapters.report import InitReport, LayerReport
from lora_one.adapters.state import load_initial_state, save_initial_state
from lora_one.adapters.write import Options
from lora_one.gradients.tokens import Batch
from lora_one.layers import AdaptedLayer
from lora_one.sharding import own_part, reshard

CHECKSUM = "sha256"
"""Key in the stored report of the sum of the factors' file."""
PIECE = 2**20
"""Entries of a weight that are looked at together: a whole embedding takes gigabytes in fp64."""


def fingerprint(
    peft_model: PeftModel,
    layers: Sequence[AdaptedLayer],
    batches: Iterable[Batch] | None,
    options: Options,
    **more: Any,
) -> str:
    """Return the hexadecimal key; under ``torch.distributed`` that of all ranks together."""
    digest = hashlib.sha256()
    facts = {
        "versions": [lora_one.__version__, _source(), torch.__version__],
        "options": {**asdict(options), "dtype": str(options.dtype)},
        "layers": [[x.name, x.shape, x.r, x.s, str(x.A.dtype)] for x in layers],
        "model": _architecture(peft_model.get_base_model()),
        "more": more,
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    reshard(peft_model)
    base = peft_model.get_base_model()
    for name, tensor in chain(base.named_parameters(), base.named_buffers()):
        if ".lora_" not in name:
            sums = _sums(own_part(tensor.detach()).flatten())
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sums}".encode())
    for batch in batches or ():
        for key in sorted(batch):
            digest.update(f"{key} {_content(batch[key])}".encode())
    keys = _of_all_ranks(digest.hexdigest())
    return keys[0] if len(keys) == 1 else hashlib.sha256("".join(keys).encode()).hexdigest()


def load_cached(
    peft_model: PeftModel, folder: Path, key: str, adapter_name: str
) -> InitReport | None:
    """Bring the model to the stored start and return its report, or None if there is none.

    A start that is not as it was written is none. Another run may be storing it right now, so that
    some ranks see it already: then none uses it.
    """
    state, report = _files(folder, key)
    stored = _whole_report(state, report)
    if not all(_of_all_ranks(stored is not None)):
        return None
    stored["layers"] = [
        LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in stored["layers"]
    ]
    load_initial_state(peft_model, state, adapter_name, force=True)  # the caller has checked
    return InitReport(**{**stored, "adapter_name": adapter_name, "cached": True})


def store(peft_model: PeftModel, folder: Path, key: str, report: InitReport) -> None:
    """Keep the model's start and its report; the report comes last and makes it valid.

    Several processes may store the same start at once, also on several machines. One that finds
    it there, and whole, leaves it: another may be reading it.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    state, report_file = _files(folder, key)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as own:
        new_state, new_report = Path(own) / state.name, Path(own) / report_file.name
        save_initial_state(peft_model, new_state, report.adapter_name)
        new_report.write_text(json.dumps(report.to_dict() | {CHECKSUM: _sha256(new_state)}))
        if _whole_report(state, report_file) is None:
            for new, file in ((new_state, state), (new_report, report_file)):
                _sync(new)
                new.replace(file)


def _sums(values: Tensor) -> list[float]:
    """Return the sum, the sum of squares and the first entry, summed in fp64 piece by piece."""
    sums = torch.zeros(3, dtype=torch.float64, device=values.device)
    sums[2] = values[:1].double().sum()
    for piece in values.split(PIECE):
        wide = piece.double()
        sums[:2] += torch.stack([wide.sum(), wide.square().sum()])
    return sums.tolist()


def _architecture(base: nn.Module) -> list[Any]:
    """Return what decides the gradient besides tensors, as far as a model tells."""
    config = getattr(base, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    idle = ("_name_or_path", "use_cache")
    settings = {name: value for name, value in settings.items() if name not in idle}
    dropout = [
        (name, module.p)
        for name, module in base.named_modules()
        if isinstance(module, _DropoutNd) and ".lora_dropout" not in name
    ]
    return [type(base).__name__, _content(settings), dropout]


def _content(value: Any) -> Any:
    """Return a value with every number of its tensors, and names as strings."""
    if isinstance(value, Tensor):
        return value.dtype, value.cpu().tolist()
    if isinstance(value, Mapping):
        return {str(name): _content(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_content(item) for item in value]
    return value


def _of_all_ranks(value: Any) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _whole_report(state: Path, report: Path) -> dict[str, Any] | None:
    """Return the report of a stored start; None where one of its files is missing or damaged."""
    if not (state.is_file() and report.is_file()):
        return None
    try:
        stored = json.loads(report.read_text())
        return stored if stored.pop(CHECKSUM) == _sha256(state) else None
    except (ValueError, KeyError):
        return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(file: Path) -> None:
    """Wait until the content is on the disk: its name must not get there first."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def _source() -> str:
    """Return a hash of the code that computes a start."""
    root = Path(lora_one.__file__).parent
    digest = hashlib.sha256()
    for folder in ("numerics", "gradients", "adapters"):
        for file in sorted((root / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _files(folder: Path, key: str) -> tuple[Path, Path]:
    return folder / f"{key[:32]}.safetensors", folder / f"{key[:32]}.json"
