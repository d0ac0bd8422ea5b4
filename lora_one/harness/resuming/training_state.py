"""The state of a training as safetensors and JSON files: exact, without pickle.

Weights, the optimiser's moments, the learning rate schedule, AdaLoRA's importance scores, and for
every rank its random number generators and the loss that it has summed since the last line.
"""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_one.adapters.state import load_initial_state, save_initial_state
from lora_one.adapters.write import initial_state
from lora_one.errors import InputError

WEIGHTS, START = "weights.safetensors", "initial.safetensors"
OPTIMIZER, OPTIMIZER_SETTINGS = "optimizer.safetensors", "optimizer.json"
SCHEDULER = "scheduler.json"
ALLOCATION, RANK_PATTERN = "adalora.safetensors", "adalora.json"
# AdaLoRA's allocator: importance of each entry, its running mean and its uncertainty.
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def save_model(model: nn.Module, folder: Path) -> None:
    """Write everything that training may have changed, and the adapter's start."""
    _save(_changing(model), folder / WEIGHTS)
    if isinstance(model, PeftModel) and initial_state(model) is not None:
        save_initial_state(model, folder / START)
    allocator = _allocator(model)
    if allocator is not None:
        scores = {
            f"{score}/{name}": tensor
            for score in SCORES
            for name, tensor in getattr(allocator, score).items()
        }
        _save(scores, folder / ALLOCATION)
        _write_json(folder / RANK_PATTERN, {"rank_pattern": allocator.peft_config.rank_pattern})


def load_model(model: nn.Module, folder: Path) -> None:
    """Bring a fresh model, its adapter attached and not started, to the state of a checkpoint.

    The start comes first: it holds what was taken from the base weights.

    Raises:
        InputError: if the checkpoint is of a model with other parameters.
    """
    if (folder / START).exists():
        load_initial_state(model, folder / START)
    stored, present = load_file(folder / WEIGHTS), _changing(model)
    for name in sorted(stored.keys() | present.keys()):
        shapes = [tuple(held[name].shape) if name in held else None for held in (stored, present)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{folder} does not fit the model: {name} is {shapes[0] or 'missing'} in the "
                f"checkpoint and {shapes[1] or 'missing'} in the model."
            )
    with torch.no_grad():
        for name, parameter in present.items():
            parameter.copy_(stored[name])
    allocator = _allocator(model)
    if allocator is not None:
        for key, tensor in load_file(folder / ALLOCATION).items():
            score, _, name = key.partition("/")
            getattr(allocator, score)[name] = tensor.to(model.device)
        allocator.peft_config.rank_pattern = _read_json(folder / RANK_PATTERN)["rank_pattern"]


def stored_ranks(folder: Path) -> dict[str, int]:
    """Return the rank of each layer's adapter in a checkpoint: ``lora_A`` is (r, in)."""
    before, after = "base_model.model.", ".lora_A.default.weight"
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {
            key.removeprefix(before).removesuffix(after): file.get_slice(key).get_shape()[0]
            for key in file.keys()  # noqa: SIM118 -- safe_open is no mapping
            if key.endswith(after)
        }


def save_optimizer(optimizer: Optimizer, scheduler: Any, folder: Path) -> None:
    """Write the optimiser's state, the settings of its groups, and the schedule."""
    names = {parameter: f"{index}" for index, parameter in enumerate(_parameters(optimizer))}
    tensors, numbers = {}, {}
    for owner, values in optimizer.state.items():
        # Most optimisers keep state by parameter, PEFT's LoRA-FA by name.
        name = f"name/{owner}" if isinstance(owner, str) else f"index/{names[owner]}"
        for key, value in values.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{name}/{key}"] = value
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    _save(tensors, folder / OPTIMIZER)
    _write_json(folder / OPTIMIZER_SETTINGS, {"numbers": numbers, "groups": groups})
    _write_json(folder / SCHEDULER, scheduler.state_dict())


def load_optimizer(optimizer: Optimizer, scheduler: Any, folder: Path) -> None:
    """Bring a fresh optimiser and schedule over the same parameters to a checkpoint's state.

    The state is set as it was; torch's ``load_state_dict`` would cast it to the parameters' dtype.
    """
    parameters = _parameters(optimizer)
    settings = _read_json(folder / OPTIMIZER_SETTINGS)
    for key, value in (load_file(folder / OPTIMIZER) | settings["numbers"]).items():
        kind, _, rest = key.partition("/")
        name, _, entry = rest.rpartition("/")
        owner = name if kind == "name" else parameters[int(name)]
        if isinstance(value, Tensor):
            value = value.to(_device_of(owner, entry, parameters, optimizer))
        optimizer.state[owner][entry] = value
    for group, stored in zip(optimizer.param_groups, settings["groups"], strict=True):
        for key, value in stored.items():
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    scheduler.load_state_dict(_read_json(folder / SCHEDULER))


def pack_rank(loss_sum: Tensor) -> bytes:
    """Return this rank's random number generators and summed loss; equally long on every rank."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, numpy_gauss = np.random.get_state()
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor(math.nan if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(numpy_gauss, dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "loss_sum": loss_sum.detach().cpu(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return save(tensors)


def unpack_loss(packed: bytes) -> Tensor:
    """Return the summed loss of ``pack_rank``."""
    return load(packed)["loss_sum"]


def restore_generators(packed: bytes) -> None:
    """Set this rank's random number generators as they were at ``pack_rank``."""
    tensors = load(packed)
    gauss = tensors["python_gauss"].item()
    words = tuple(tensors["python"].tolist())
    random.setstate((3, words, None if math.isnan(gauss) else gauss))
    *keys, position, has_gauss = tensors["numpy"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss)
    np.random.set_state((*state, tensors["numpy_gauss"].item()))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _changing(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, and all of an adapter, whatever an optimiser (LoRA-FA) freezes of it."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or ".lora_" in name
    }


def _allocator(model: nn.Module) -> Any:
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _device_of(
    owner: nn.Parameter | str, entry: str, parameters: list[nn.Parameter], optimizer: Optimizer
) -> torch.device:
    """A moment lies with its parameter; a count of steps does only for a fused optimiser."""
    if isinstance(owner, str):
        return parameters[0].device
    if entry != "step":
        return owner.device
    on_device = any(
        group.get("fused") or group.get("capturable") for group in optimizer.param_groups
    )
    return owner.device if on_device else torch.device("cpu")


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
