"""What an initialisation or an export refuses, before anything is changed."""

from collections import Counter
from collections.abc import Mapping

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from lora_one.adapters.stored import changes_base
from lora_one.adapters.write import Options, initial_state, initial_states
from lora_one.errors import InputError, nearest
from lora_one.layers import (
    AdaptedLayer,
    TargetLayer,
    is_out_of_reach,
    is_quantised,
    is_readable,
)
from lora_one.numerics.methods import METHODS
from lora_one.sharding import is_cut, own_part, reshard


def check_layers(layers: list[AdaptedLayer], options: Options) -> None:
    """Raise ``InputError`` for a layer on which the method cannot work, before anything runs."""
    for layer in layers:
        _check_present(layer)
        if not layer.s > 0:
            raise InputError(
                f"the product of layer '{layer.name}' is multiplied by {layer.s}; expected a "
                "positive number: set lora_alpha, or its entry in alpha_pattern, above 0."
            )
    spec = options.spec
    usable = {layer: min(layer.shape) // spec.rank_multiple for layer in layers}
    tight = [layer for layer in layers if layer.r > usable[layer]]
    if tight:
        layer = min(tight, key=usable.__getitem__)
        needs = "2 r" if spec.rank_multiple == 2 else "r"
        fits = f"at most rank {usable[layer]} there. Lower r, set rank_pattern for this layer, or"
        raise InputError(
            f"rank {layer.r} is too large for layer '{layer.name}' of shape {layer.shape}: "
            f"{options.method} needs {needs} <= {min(layer.shape)}, so "
            f"{fits if usable[layer] else 'no rank fits;'} leave it out (exclude_modules)."
        )
    for layer in layers:
        m, n = layer.shape
        if tuple(layer.A.shape) != (layer.r, n) or tuple(layer.B.shape) != (m, layer.r):
            raise InputError(
                f"the adapter of layer '{layer.name}' is sharded or flattened (lora_A "
                f"{tuple(layer.A.shape)}, expected {(layer.r, n)}). Initialise before wrapping "
                "the model with FSDP or DeepSpeed ZeRO-3."
            )
        if spec.offset and is_quantised(layer.module):
            raise InputError(
                f"layer '{layer.name}' is quantised, and {options.method} would have to rewrite "
                f"its weight. Methods that leave it alone: {_without_offset()}. Or initialise on "
                "the unquantised model and quantise the offset weights afterwards."
            )
        if options.reads_weight:
            check_readable(layer, options.method)
        if (spec.offset or options.reads_weight) and is_out_of_reach(layer):
            raise InputError(
                f"the weight of layer '{layer.name}' is sharded, and {options.method} needs all "
                "of it. Initialise before wrapping the model with FSDP1 or DeepSpeed ZeRO-3, or "
                "shard it with FSDP2 (fully_shard)."
            )


def check_gradients(layers: list[AdaptedLayer], gradients: Mapping[str, Tensor] | None) -> None:
    """Raise ``InputError`` unless there is one gradient of the right shape per layer, no other."""
    names = [layer.name for layer in layers]
    given = gradients or {}
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(
            f"no gradient for {len(missing)} of {len(names)} adapted layers, first "
            f"'{missing[0]}'.{nearest(missing[0], given)}"
        )
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise InputError(
            f"gradient for '{unknown[0]}', which is no adapted linear layer."
            f"{nearest(unknown[0], names)}"
        )
    for layer in layers:
        if tuple(given[layer.name].shape) != layer.shape:
            raise InputError(
                f"the gradient of '{layer.name}' has shape {tuple(given[layer.name].shape)}, "
                f"expected (out, in) = {layer.shape}."
            )


def check_readable(layer: TargetLayer, method: str) -> None:
    """Raise ``InputError`` where W is not there, or hidden by the format of a quantised layer."""
    weight = getattr(layer.module, "weight", None)
    if weight is not None and weight.is_meta:
        raise InputError(
            f"the weight of layer '{layer.name}' is on the meta device, and {method} looks at it. "
            "Load the weights first, without low_cpu_mem_usage or offloading."
        )
    if not is_readable(layer.module):
        raise InputError(
            f"layer '{layer.name}' is a {type(layer.module).__name__}, whose weight is packed in a "
            f"way that is not known here, and {method} as asked for looks at it. Leave norm_clip "
            "and the scale weightS out, choose lora or lora_one, or load the model unquantised."
        )


def _check_present(layer: AdaptedLayer) -> None:
    """Raise ``InputError`` unless the adapter is a plain LoRA or DoRA, on, and where W is."""
    name, adapter, peft_layer = layer.name, layer.adapter_name, layer.peft_layer
    if peft_layer.merged:
        raise InputError(
            f"the adapter of layer '{name}' is merged into the base weights; call "
            "unmerge_adapter() first."
        )
    if peft_layer.disable_adapters:
        raise InputError(
            f"the adapters of the model are switched off (layer '{name}'), so a start would have "
            "no effect; call enable_adapter_layers(), or leave the disable_adapter() block."
        )
    variant = peft_layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, DoraLinearVariant):
        raise InputError(
            f"layer '{name}' carries PEFT's variant {type(variant).__name__}, whose product is not "
            "s B A. Expected a plain LoRA or DoRA: leave the variant out of the LoraConfig."
        )
    weight = getattr(layer.module, "weight", None)
    devices = {factor.device for factor in (layer.A, layer.B)}
    # FSDP2 and ZeRO-3 may keep their parts of a weight elsewhere, and fetch them when needed.
    if weight is not None and not is_cut(weight) and weight.numel():
        devices.add(weight.device)
    if any(device.type == "meta" for device in devices):
        raise InputError(
            f"layer '{name}' has no values yet: its weight or its adapter is on the meta device. "
            "Load the weights first, without low_cpu_mem_usage or offloading."
        )
    if len(devices) > 1:
        raise InputError(
            f"the weight and the adapter of layer '{name}' are on different devices "
            f"({', '.join(sorted(map(str, devices)))}). Move the whole PeftModel with .to(device)."
        )


def check_active(layers: list[AdaptedLayer]) -> None:
    """Raise ``InputError`` unless the adapter takes part in the forward pass."""
    for layer in layers:
        active = layer.peft_layer.active_adapters
        if layer.adapter_name not in active:
            raise InputError(
                f"adapter '{layer.adapter_name}' is not active (active: {', '.join(active)}), so "
                "the init batch's loss would not be that of its start; call "
                f"set_adapter('{layer.adapter_name}') first."
            )


def check_untrained(peft_model: PeftModel, layers: list[AdaptedLayer]) -> None:
    """Raise ``InputError`` if a start would overwrite factors that were trained.

    Untrained are ``B = 0``, as PEFT starts, and the very factors that this library wrote. What is
    cut up between ranks is judged by the own rows.
    """
    for layer in layers:
        state = initial_state(peft_model, layer.adapter_name)
        if state is not None and layer.name in state.factors:
            present = (layer.B.detach().cpu(), layer.A.detach().cpu())
            pairs = zip(present, state.factors[layer.name], strict=True)
            trained = any(not now.equal(then) for now, then in pairs)
        else:
            trained = bool(own_part(layer.B.detach()).any())
        if trained:
            raise InputError(
                f"adapter '{layer.adapter_name}' holds factors that are not a start (layer "
                f"'{layer.name}'): it was trained, loaded or started otherwise, and they would be "
                "lost. Attach a new adapter, or give force=True to overwrite it."
            )


def check_base_is_untouched(peft_model: PeftModel, adapter_name: str) -> None:
    """Raise ``InputError`` if other than by this adapter's own start, W is not the base's any more.

    An adapter for the untouched base cannot be told from one for changed weights.
    """
    for name, state in initial_states(peft_model).items():
        if state.offset and (name != adapter_name or initial_state(peft_model, name) is not state):
            deleted = "a deleted " if name == adapter_name else ""
            raise InputError(
                f"{deleted}adapter '{name}' was started with {state.method}, which changed the "
                f"base weights that adapter '{adapter_name}' uses too. Give each its own copy of "
                "the base."
            )
    for name, config in peft_model.peft_config.items():
        start = getattr(config, "init_lora_weights", True)
        if changes_base(start) and _has_product(peft_model, name):
            raise InputError(
                f"PEFT started adapter '{name}' with init_lora_weights='{start}', which changes "
                "the base weights. Load the base again and give "
                "LoraConfig(init_lora_weights=True); a trained adapter is converted by PEFT's "
                "save_pretrained(path_initial_model_for_weight_conversion=...)."
            )


def check_not_offset(peft_model: PeftModel, adapter_name: str) -> None:
    """Raise ``InputError`` if the base weights already carry an adapter's offset."""
    state = initial_state(peft_model, adapter_name)
    if state is not None and state.offset:
        raise InputError(
            f"adapter '{adapter_name}' was already initialised with {state.method}, which changed "
            "the base weights. Load the base model again before initialising anew."
        )
    check_base_is_untouched(peft_model, adapter_name)


def check_alone(layers: list[AdaptedLayer], method: str) -> None:
    """Raise ``InputError`` if another adapter uses a weight that the method changes."""
    for layer in layers:
        others = [name for name in layer.peft_layer.lora_A if name != layer.adapter_name]
        if others:
            raise InputError(
                f"{method} changes the weight of layer '{layer.name}', which adapter "
                f"'{others[0]}' uses too. Give each its own copy of the base, or choose a method "
                f"that leaves the weights alone: {_without_offset()}."
            )


def check_ties(peft_model: PeftModel, layers: list[AdaptedLayer], method: str) -> None:
    """Raise ``InputError`` where a weight to be changed is another module's too, and sharded.

    A tied weight is copied before it is changed, and FSDP2 would go on with the original.
    """
    reshard(peft_model)
    uses = parameter_uses(peft_model)
    for layer in layers:
        weight = getattr(layer.module, "weight", None)
        if weight is not None and is_cut(weight) and uses[id(weight)] > 1:
            raise InputError(
                f"the weight of layer '{layer.name}' is tied to another module's and sharded, and "
                f"{method} would change both. Leave the layer out of target_modules, or do not "
                "shard the model."
            )


def parameter_uses(model: nn.Module) -> Counter[int]:
    """Count the modules that hold each parameter, by ``id``; more than one where it is tied."""
    owned = (module.parameters(recurse=False) for module in model.modules())
    return Counter(id(parameter) for parameters in owned for parameter in parameters)


def _has_product(peft_model: PeftModel, adapter_name: str) -> bool:
    """Whether any layer's B differs from zero."""
    layers = (module for module in peft_model.modules() if isinstance(module, LoraLayer))
    factors = (layer.lora_B[adapter_name] for layer in layers if adapter_name in layer.lora_B)
    return any(bool(own_part(factor.weight.detach()).any()) for factor in factors)


def _without_offset() -> str:
    return ", ".join(name for name, method in METHODS.items() if not method.offset)
