"""Which layers of a model are looked at: their names in the base model, shapes and weights."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_one.errors import InputError, nearest, some
from lora_one.sharding import is_cut, overwrite, own_part, whole

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer of the base model: its name there, the module and W's shape (out, in)."""

    name: str
    module: nn.Module
    shape: tuple[int, int]


@dataclass(frozen=True)
class AdaptedLayer(TargetLayer):
    """A linear layer with a LoRA adapter on it."""

    peft_layer: LoraLayer
    adapter_name: str

    @property
    def r(self) -> int:
        """The rank of this layer's adapter."""
        return self.peft_layer.r[self.adapter_name]

    @property
    def s(self) -> float:
        """The factor in front of B A."""
        return self.peft_layer.scaling[self.adapter_name]

    @property
    def A(self) -> nn.Parameter:  # noqa: N802 (the paper's and PEFT's name)
        """``lora_A``'s weight (r, in)."""
        return self.peft_layer.lora_A[self.adapter_name].weight

    @property
    def B(self) -> nn.Parameter:  # noqa: N802 (the paper's and PEFT's name)
        """``lora_B``'s weight (out, r)."""
        return self.peft_layer.lora_B[self.adapter_name].weight


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes ``W x + b``: ``nn.Linear``, ``Conv1D`` or a quantised linear."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    has_sizes = hasattr(module, "in_features") and hasattr(module, "out_features")
    return has_sizes and not isinstance(module, nn.Bilinear | LoraLayer)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return W's shape as (out, in), also where the stored weight is packed or transposed."""
    if isinstance(module, Conv1D):
        return module.nf, module.weight.shape[0]
    return module.out_features, module.in_features


def is_quantised(module: nn.Module) -> bool:
    """Whether the stored weight is other than W itself in a floating dtype of at least 16 bits.

    Or is W, and rounded to 8 bits in every pass (bitsandbytes' ``llm_int8_has_fp16_weight``).
    """
    weight = getattr(module, "weight", None)
    if weight is None or hasattr(module, "W_q") or hasattr(weight, "quant_state"):
        return True
    if _is_int8(weight):  # floating with has_fp16_weights
        return True
    return not weight.is_floating_point() or weight.element_size() == 1 or _is_torchao(weight)


def is_readable(module: nn.Module) -> bool:
    """Whether ``base_weight`` can tell W: of quantised layers, that of those whose format it knows.

    These are bitsandbytes (4 and 8 bit), transformers' FP8, HQQ and torchao.
    """
    weight = getattr(module, "weight", None)
    if not is_quantised(module) or hasattr(module, "W_q") or _is_torchao(weight):
        return True
    bitsandbytes = type(weight).__name__ == "Params4bit" or _is_int8(weight)
    return bitsandbytes or (_is_fp8(module) and weight.is_floating_point())


def is_out_of_reach(layer: TargetLayer) -> bool:
    """Whether the weight has lost its shape (FSDP1, ZeRO-3); FSDP2's can be put together."""
    if is_quantised(layer.module):
        return False
    return sorted(layer.module.weight.shape) != sorted(layer.shape)


def base_weight(module: nn.Module) -> Tensor:
    """Return W (out, in), dequantised where the layer is quantised. Not to be written to.

    Collective where FSDP2 has cut the weight up.
    """
    if _is_int8(getattr(module, "weight", None)):
        if module.weight.is_floating_point():  # has_fp16_weights: the scales are of the last pass
            return module.weight.detach()
        # PEFT's dequantisation moves the parameter, after which a layer on the CPU has lost its
        # scales. An entry is its integer times its row's largest magnitude / 127.
        scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
        return module.weight.detach() * (scales.view(-1, 1).float() / 127)
    if _is_fp8(module):
        return module.weight.detach().float() * _scales(module)
    weight = dequantize_module_weight(module) if is_quantised(module) else module.weight
    weight = whole(weight.detach())
    return weight.T if isinstance(module, Conv1D) else weight


def write_base_weight(layer: TargetLayer, W: Tensor) -> None:
    """Store W (out, in) as the layer's weight, rounded once to the dtype it had.

    The layer gets its own parameter, so that a tied weight (an ``lm_head`` that is also the
    embedding) changes in this layer only. A weight that FSDP2 has cut up is written in place, each
    rank its own rows: FSDP holds on to the parameter.
    """
    old = layer.module.weight
    stored = W.T if isinstance(layer.module, Conv1D) else W
    if is_cut(old):
        overwrite(old, stored.to(old.dtype))
        return
    new = nn.Parameter(stored.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    layer.module.weight = new


def base_name(name: str) -> str:
    """Strip what FSDP, ``torch.compile`` and checkpoint wrappers add to a module's name."""
    return _WRAPPERS.sub("", name)


def adapted_layers(peft_model: PeftModel, adapter_name: str = "default") -> list[AdaptedLayer]:
    """Return the linear layers that carry the named LoRA adapter, in the model's order.

    Embeddings, convolutions, AdaLoRA layers and what ``dependent_layers`` finds are not among them;
    see ``other_adapted``.

    Raises:
        InputError: if the model has no such adapter or no such layer.
    """
    check_adapter(peft_model, adapter_name)
    layers = []
    for name, module in _plain(peft_model, adapter_name).items():
        base = module.get_base_layer()
        layers.append(AdaptedLayer(name, base, linear_shape(base), module, adapter_name))
    if not layers:
        candidates = [name for name, module in _linears(peft_model.get_base_model())]
        raise InputError(
            f"No linear layer carries a plain LoRA adapter named '{adapter_name}'. "
            f"Linear layers of this model: {some(candidates, 8)}."
        )
    return layers


def other_adapted(peft_model: PeftModel, adapter_name: str = "default") -> list[str]:
    """Return the names of the other adapted layers, which keep PEFT's own start."""
    plain = _plain(peft_model, adapter_name)
    return [name for name in lora_layers(peft_model, adapter_name) if name not in plain]


def lora_layers(peft_model: PeftModel, adapter_name: str = "default") -> dict[str, LoraLayer]:
    """Return the layers that carry the named adapter, of any kind, by name in the base model."""
    return {
        base_name(name): module
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
        and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A)
    }


def dependent_layers(peft_model: PeftModel, adapter_name: str) -> set[nn.Module]:
    """Return the adapted linear layers whose start and rank are another layer's.

    These are the output projection of ``nn.MultiheadAttention``, which PEFT adapts like the
    in-projection and which is never called, so that no gradient is seen; and a head whose factors
    are those of the embedding, transposed (``ensure_weight_tying``).
    """
    modules = [x for x in peft_model.modules() if isinstance(x, LoraLayer)]
    found = {x.get_base_layer().out_proj for x in modules if isinstance(x, MultiheadAttention)}
    embedded = {
        own_part(x.lora_embedding_A[adapter_name]).data_ptr()
        for x in modules
        if adapter_name in x.lora_embedding_A
    } - {0}  # a tensor that holds nothing here
    linear = [x for x in modules if embedded and adapter_name in x.lora_B]
    found |= {x for x in linear if own_part(x.lora_B[adapter_name].weight).data_ptr() in embedded}
    return found


def plain_layers(model: nn.Module, target_modules: Collection[str] | str) -> list[TargetLayer]:
    """Return the linear layers of a plain model that PEFT's ``target_modules`` would select.

    Args:
        model: without adapters.
        target_modules: a list of names or endings, a regular expression for the whole name, or
            ``"all-linear"`` for every linear layer but the output embedding, or a sequence
            classifier's head.

    Raises:
        InputError: if nothing matches.
    """
    linears = list(_linears(model))
    if target_modules == "all-linear":
        head = _head(model)
        chosen = [(name, module) for name, module in linears if module is not head]
    elif isinstance(target_modules, str):
        chosen = [pair for pair in linears if re.fullmatch(target_modules, pair[0])]
    else:
        endings = tuple(f".{target}" for target in target_modules)
        chosen = [pair for pair in linears if f".{pair[0]}".endswith(endings)]
    if not chosen:
        names = [name for name, _ in linears]
        hint = nearest(str(target_modules), {name.rpartition(".")[2] for name in names})
        raise InputError(
            f"target_modules={target_modules!r} matches no linear layer.{hint} "
            f"Linear layers of this model: {some(names, 8)}."
        )
    return [TargetLayer(name, module, linear_shape(module)) for name, module in chosen]


def check_adapter(peft_model: PeftModel, adapter_name: str) -> None:
    """Raise ``InputError`` unless the argument is a ``PeftModel`` with the named adapter."""
    if not isinstance(peft_model, PeftModel):
        raise InputError(
            f"expected a peft.PeftModel, got {type(peft_model).__name__}; wrap the model with "
            "peft.get_peft_model first."
        )
    if adapter_name not in peft_model.peft_config:
        valid = list(peft_model.peft_config)
        raise InputError(
            f"no adapter named '{adapter_name}'.{nearest(adapter_name, valid)} "
            f"Adapters of this model: {', '.join(valid)}."
        )


def _is_int8(weight: Tensor | None) -> bool:
    return type(weight).__name__ == "Int8Params"


def _is_fp8(module: nn.Module) -> bool:
    return is_quantised(module) and getattr(module, "weight_scale_inv", None) is not None


def _is_torchao(weight: Tensor | None) -> bool:
    return type(weight).__module__.startswith("torchao.")


def _scales(module: nn.Module) -> Tensor:
    """Return what multiplies each entry of transformers' FP8 weight: one number, or one a block."""
    scales = module.weight_scale_inv.detach().float()
    if module.block_size is None:
        return scales
    for dim, size in enumerate(module.block_size):
        scales = scales.repeat_interleave(size, dim).narrow(dim, 0, module.weight.shape[dim])
    return scales


def _plain(peft_model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    dependent = dependent_layers(peft_model, adapter_name)
    return {
        name: module
        for name, module in lora_layers(peft_model, adapter_name).items()
        if adapter_name in module.lora_A
        and is_linear(module.get_base_layer())
        and not isinstance(module, AdaLoraLayer)
        and module not in dependent
    }


def _head(model: nn.Module) -> nn.Module | None:
    """Return the layer that PEFT leaves out of ``"all-linear"``, if there is one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None and type(model).__name__.endswith("ForSequenceClassification"):
        heads = (getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES)
        head = next((head for head in heads if head is not None), None)
    return head


def _linears(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if is_linear(module) and ".lora_" not in name:
            yield base_name(name).removesuffix(".base_layer"), module


def model_device(model: nn.Module) -> torch.device:
    """Return where the model wants its inputs: where its input embedding computes.

    Raises:
        InputError: if that has no values: it is on the meta device, and accelerate did not put it
            there.
    """
    try:
        first = model.get_input_embeddings()
        device = computing_device(first)
    except (AttributeError, NotImplementedError):  # models of images or sound have none
        first, device = model, computing_device(model)
    if device.type == "meta":
        raise InputError(
            f"the {type(first).__name__} of this model has no values yet: it is on the meta "
            "device. Load the weights first."
        )
    return device


def computing_device(module: nn.Module) -> torch.device:
    """Return the device of a module's weights, or to which accelerate brings offloaded ones."""
    weight = next(chain(module.parameters(), module.buffers()))  # GPTQ and AWQ have buffers alone
    brought = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(brought) if weight.is_meta and brought is not None else weight.device
