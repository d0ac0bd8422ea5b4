"""An adapter's start as one safetensors file: what export needs, and what resuming needs."""

import json
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from lora_one.adapters.checks import check_alone, check_not_offset, check_untrained
from lora_one.adapters.write import (
    InitialState,
    initial_state,
    remember,
    reset_dora_magnitude,
    subtract_offset,
    write_factors,
)
from lora_one.errors import InputError
from lora_one.layers import adapted_layers
from lora_one.sharding import reshard


def save_initial_state(
    peft_model: PeftModel, file: str | Path, adapter_name: str = "default"
) -> None:
    """Write the initial factors B0 and A0 with the method's name and options to one file.

    Raises:
        InputError: if the adapter was not started by this library.
    """
    state = initial_state(peft_model, adapter_name)
    if state is None:
        raise InputError(f"adapter '{adapter_name}' has no initial state; initialise it first.")
    tensors = {}
    for name, (B, A) in state.factors.items():
        tensors[f"{name}.lora_B"], tensors[f"{name}.lora_A"] = B.contiguous(), A.contiguous()
    header = {
        "format": "pt",
        "method": state.method,
        "offset": json.dumps(state.offset),
        "options": json.dumps(state.metadata),
    }
    save_file(tensors, str(file), metadata=header)


def load_initial_state(
    peft_model: PeftModel, file: str | Path, adapter_name: str = "default", *, force: bool = False
) -> InitialState:
    """Bring a fresh ``PeftModel`` over the untouched base to the start the file describes.

    The factors are written, the offset is taken from the base weights by the computation of the
    first time, so the weights are the same bit for bit, and DoRA's magnitudes are set. Trained
    factors are loaded afterwards, by PEFT.

    Args:
        peft_model: fresh, over the untouched base.
        file: of ``save_initial_state``.
        adapter_name: which adapter.
        force: overwrite factors that are not a start.

    Raises:
        InputError: if the file does not fit the model, the base already carries an offset, or the
            adapter was trained.
    """
    check_not_offset(peft_model, adapter_name)
    if not Path(file).is_file():
        raise InputError(f"no initial state at {file}.")
    with safe_open(str(file), framework="pt") as stored:
        header = stored.metadata()
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no dict)
    state = InitialState(
        header["method"], json.loads(header["offset"]), json.loads(header["options"])
    )
    names = {key.removesuffix(".lora_B") for key in tensors if key.endswith(".lora_B")}
    layers = {}
    if names:
        layers = {layer.name: layer for layer in adapted_layers(peft_model, adapter_name)}
    unknown = sorted(names - set(layers))
    if unknown:
        raise InputError(f"{file} holds layer '{unknown[0]}', which carries no adapter here.")
    for name in names:
        shapes = tuple(tensors[f"{name}.lora_B"].shape), tuple(tensors[f"{name}.lora_A"].shape)
        expected = tuple(layers[name].B.shape), tuple(layers[name].A.shape)
        if shapes != expected:
            raise InputError(f"{file}, layer '{name}': shapes {shapes}, expected {expected}.")
    written = [layers[name] for name in sorted(names)]
    if state.offset:
        check_alone(written, state.method)
    if not force:
        check_untrained(peft_model, written)
    reshard(peft_model)
    for layer in written:
        B, A = tensors[f"{layer.name}.lora_B"], tensors[f"{layer.name}.lora_A"]
        write_factors(layer, B, A, B.dtype)
        if state.offset:
            subtract_offset(layer)
        reset_dora_magnitude(layer)
        state.factors[layer.name] = (B, A)
        state.scalings[layer.name] = layer.s
    remember(peft_model, adapter_name, state, written)
    return state
