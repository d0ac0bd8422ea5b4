"""The adapter on top of a base model: its config, what it targets, how it is attached."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel

from lora_one.adapters.allocation import alpha_pattern
from lora_one.errors import InputError, nearest
from lora_one.harness.config.schema import Config
from lora_one.harness.models.base import Base, skeleton
from lora_one.numerics.methods import METHODS

TASK_TYPES = {
    "causal": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "classification": TaskType.SEQ_CLS,
}
# Names of heads that PEFT itself trains and saves in full.
ADDED_BY_PEFT = ("classifier", "score")
# AdaLoRA starts with a larger budget than it ends with, 1.5 times as in its paper.
ADALORA_START = 1.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def adapter_config(config: Config, base: Base, total_steps: int | None = None) -> PeftConfig:
    """Translate the ``peft`` section into PEFT's own config.

    Args:
        config: The whole configuration.
        base: The base model.
        total_steps: Optimiser steps of the run; AdaLoRA plans its pruning with them.

    Raises:
        InputError: if the targets name nothing in this model.
    """
    peft = config.peft
    model = skeleton(base)
    shared = {
        "task_type": TASK_TYPES[base.architecture],
        "target_modules": _targets(peft.lora_target_modules, model),
        "lora_alpha": peft.lora_alpha,
        "lora_dropout": peft.lora_dropout,
        "modules_to_save": _trained_in_full(config, base, model) or None,
    }
    if peft.adalora:
        steps = total_steps or 1000
        # Warm up a tenth of the run at full rank, keep the last third at the final rank.
        return AdaLoraConfig(
            init_r=round(ADALORA_START * peft.lora_r),
            target_r=peft.lora_r,
            tinit=steps // 10,
            tfinal=steps // 3,
            deltaT=max(1, steps // 100),
            total_step=steps,
            **shared,
        )
    return LoraConfig(
        r=peft.lora_r,
        use_rslora=peft.use_rslora,
        use_dora=peft.dora,
        ensure_weight_tying=peft.train_embeddings and bool(model.config.tie_word_embeddings),
        **shared,
    )


def with_ranks(adapter: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """Return PEFT's config with a rank per layer, and the same scaling in all of them.

    Args:
        adapter: With the uniform rank.
        ranks: Layer name -> rank; other layers keep the uniform one.
    """
    result = copy.deepcopy(adapter)
    result.rank_pattern = {name: r for name, r in ranks.items() if r != adapter.r}
    result.alpha_pattern = alpha_pattern(
        ranks, r=adapter.r, lora_alpha=adapter.lora_alpha, use_rslora=adapter.use_rslora
    )
    return result


def _trained_in_full(config: Config, base: Base, model: PreTrainedModel) -> list[str]:
    """Name the modules that train and are exported with all their weights.

    A head is everything outside the encoder's layers: the ``classifier``, DeBERTa's ``pooler`` and
    the one inside BERT. It starts at random, in all or in many checkpoints, so an adapter without
    all of it would be one for a model that nobody has.
    """
    names = set(_embedding_names(model)) if config.peft.train_embeddings else set()
    if base.architecture == "classification":
        children = {**dict(model.named_children()), "pooler": _pooler(model)}
        children.pop(model.base_model_prefix)
        names |= {
            name
            for name, module in children.items()
            if name not in ADDED_BY_PEFT and module is not None and list(module.parameters())
        }
    return sorted(names)


def trained_in_full(base: Base, adapter: PeftConfig | None) -> set[str]:
    """Name the modules that an adapter trains with all their weights, PEFT's own choice too."""
    names = set(getattr(adapter, "modules_to_save", None) or ())
    return names | set(ADDED_BY_PEFT) if base.architecture == "classification" else names


def _pooler(model: PreTrainedModel) -> nn.Module | None:
    outside = getattr(model, "pooler", None)
    return outside if outside is not None else getattr(model.base_model, "pooler", None)


def _targets(targets: str | list[str], model: PreTrainedModel) -> str | list[str]:
    if targets == "all":
        return "all-linear"
    if targets == "qv":
        mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        if model.config.model_type not in mapping:
            raise InputError(
                f"peft=qv: PEFT does not know the query and value projections of "
                f"{model.config.model_type}. Name them: peft.lora_target_modules=[...]. "
                f"Linear layers here: {', '.join(_linear_names(model))}."
            )
        return mapping[model.config.model_type]
    if isinstance(targets, list):
        names = {part for name, _ in model.named_modules() for part in _suffixes(name)}
        for target in targets:
            if target not in names:
                linear = _linear_names(model)
                raise InputError(
                    f"peft.lora_target_modules: {target} names no module of this model."
                    f"{nearest(target, linear)} Linear layers: {', '.join(linear)}."
                )
    return targets


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _linear_names(model: nn.Module) -> list[str]:
    modules = model.named_modules()
    return sorted({name.rpartition(".")[2] for name, m in modules if isinstance(m, nn.Linear)})


def _embedding_names(model: PreTrainedModel) -> list[str]:
    embedding = model.get_input_embeddings()
    if model.config.is_encoder_decoder:
        raise InputError(
            "peft.train_embeddings=true: an encoder-decoder ties its embedding to both halves, and "
            "PEFT would train a copy that neither reads. Choose peft=all or peft=qv."
        )
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if m is embedding})


def attach_adapter(model: PreTrainedModel, adapter: PeftConfig, seed: int, dtype: str) -> PeftModel:
    """Wrap the model; the random factors of PEFT's own start come from ``seed``."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(
                # A copy: PEFT adds names to the modules that a classifier saves.
                model,
                copy.deepcopy(adapter),
                autocast_adapter_dtype=dtype == "fp32",
            )
        except ValueError as error:
            raise InputError(f"peft.lora_target_modules: {error}") from error
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            # What is trained beside the factors (embeddings, magnitudes) is kept in float32.
            target = DTYPES[dtype] if "lora_A" in name or "lora_B" in name else torch.float32
            parameter.data = parameter.data.to(target)
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for trained in module.modules_to_save.values():
                _meet_dtypes(trained, model.dtype)
    return wrapped


def _meet_dtypes(trained: nn.Module, base: torch.dtype) -> None:
    """Let a module that is trained in float32 stand in a base of another dtype."""

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = next(module.parameters()).dtype
        return tuple(x.to(dtype) if torch.is_floating_point(x) else x for x in inputs)

    trained.register_forward_pre_hook(widen)
    if isinstance(trained, nn.Embedding):  # a head's logits stay as they are
        trained.register_forward_hook(lambda module, inputs, output: output.to(base))


def target_shapes(model: PreTrainedModel, adapter: PeftConfig) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of the linear layers that the adapter would change; on a skeleton."""
    linear = f"Linear layers: {', '.join(_linear_names(model))}."
    try:
        wrapped = get_peft_model(model, copy.deepcopy(adapter))
    except (ValueError, re.error) as error:
        reason = str(error).splitlines()[0].rstrip("( .")
        raise InputError(f"peft.lora_target_modules: {reason}. {linear}") from error
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A) and hasattr(module, "out_features")
    }
    if not shapes:
        raise InputError(f"peft.lora_target_modules names no linear layer. {linear}")
    return shapes


def check_rank(config: Config, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse a rank that a target layer cannot have.

    Raises:
        InputError: naming the smallest layer and the largest rank that would do.
    """
    if not config.peft.use_peft:
        return
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    factor, why = METHODS[config.init.method].rank_multiple, ""
    if factor > 1:
        why = f" ({config.init.direction} takes {factor}r singular vectors)"
    elif config.peft.adalora:
        factor, why = ADALORA_START, " (AdaLoRA starts at rank 1.5 r)"
    if round(factor * config.peft.lora_r) > min(shape):
        usable = int(min(shape) / factor)
        fits = f"The largest usable rank is {usable}; or" if usable else "No rank fits;"
        raise InputError(
            f"peft.lora_r={config.peft.lora_r} is too large for {name}, which is "
            f"{shape[0]} x {shape[1]}{why}. {fits} name other layers with "
            "peft.lora_target_modules=[...]."
        )


def trainable_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters that the optimiser moves."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
