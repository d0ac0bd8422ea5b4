"""A model is left exactly as it was found, also after an exception."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from lora_one.errors import InputError


@contextmanager
def left_as_found(
    model: nn.Module, *, train: bool, seed: int | None = None, adapters: bool = False
) -> Iterator[None]:
    """Lend the model: frozen, in the chosen mode, without cache, adapters inactive.

    On leaving, the training mode of every module, ``requires_grad`` of every parameter, running
    statistics, ``config.use_cache``, the adapters' state and the global random numbers of
    CPU, GPUs, NumPy and ``random`` are those of before. Parameters' ``.grad`` is never touched,
    because no parameter requires one, and bitsandbytes does not repack 4-bit weights inside, after
    which no gradient would pass them.

    Args:
        model: a plain model or a ``PeftModel``.
        train: whether dropout is active inside.
        seed: if given, seeds the random numbers used inside.
        adapters: whether a ``PeftModel``'s adapters stay active.

    Raises:
        InputError: if an adapter is merged into the base weights, or a 4-bit weight lies in a
            layout that lets no gradient through.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    modes = [(module, module.training) for module in modules]
    frozen = [(parameter, parameter.requires_grad) for parameter in parameters]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    norms = [module for module in modules if isinstance(module, _NormBase)]
    statistics = [(b, b.clone()) for norm in norms for b in norm.buffers(recurse=False)]
    cuda = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    is_peft = isinstance(model, PeftModel)
    if is_peft and any(isinstance(m, BaseTunerLayer) and m.merged for m in modules):
        raise InputError("the adapter is merged into the base weights; call unmerge_adapter().")
    _require_differentiable(model)
    repacking = [(m, m.support_avx512bf16_for_cpu) for m in modules if _may_repack(m)]
    off = model.disable_adapter() if is_peft and not adapters else nullcontext()
    try:
        with torch.random.fork_rng(devices=cuda), _other_random_numbers(), off, _eagerly(modules):
            if seed is not None:
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
            for parameter, _ in frozen:
                parameter.requires_grad_(False)
            model.train(train)
            for module, _ in repacking:
                module.support_avx512bf16_for_cpu = False
            if use_cache is not None:
                config.use_cache = False
            yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache
        for module, was_possible in repacking:
            module.support_avx512bf16_for_cpu = was_possible
        for module, training in modes:
            module.training = training
        for parameter, required in frozen:
            parameter.requires_grad_(required)
        with torch.no_grad():
            for buffer, content in statistics:
                if not torch.equal(buffer, content):  # a graph that is alive may hold it
                    buffer.copy_(content)


def _eagerly(modules: list[nn.Module]) -> AbstractContextManager[Any]:
    """Run compiled modules as they were written: nothing is compiled for a single pass.

    What is compiled also counts towards the limit at which PyTorch gives a function up, so that
    training would run uncompiled.
    """
    # By module.compile() or, as a wrapper, by torch.compile(module).
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in modules)
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def _other_random_numbers() -> Iterator[None]:
    """Restore NumPy's and Python's global generators: models mask their input with them."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def _may_repack(module: nn.Module) -> bool:
    """Tell a ``bitsandbytes.nn.Linear4bit`` that repacks its weight for inference on a CPU."""
    return getattr(module, "support_avx512bf16_for_cpu", False)


def _require_differentiable(model: nn.Module) -> None:
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise InputError(
                f"no gradient passes through the 4-bit layer '{name}': on CPUs with AVX512-BF16 "
                "bitsandbytes repacks a weight for inference when it is first used in eval mode "
                "without gradients. Load the model again; to evaluate it before or while it "
                "trains, set support_avx512bf16_for_cpu = False on its Linear4bit modules first."
            )


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Switch transformers' activation checkpointing on where it is off, while the context lasts.

    By the modules' own switches: ``activation_checkpointing_enable`` also hooks the embeddings, and
    nothing takes that hook off again. Taps need no input that requires a gradient.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    modules = [m for m in base.modules() if hasattr(m, "gradient_checkpointing")]
    if any(module.gradient_checkpointing for module in modules):
        yield
        return
    switches = {
        "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False),
        "gradient_checkpointing": True,
    }
    before = [{name: vars(m)[name] for name in switches if name in vars(m)} for m in modules]
    for module in modules:
        vars(module).update(switches)
    try:
        yield
    finally:
        for module, known in zip(modules, before, strict=True):
            for name in switches:
                del vars(module)[name]
            vars(module).update(known)


def can_checkpoint(model: nn.Module) -> bool:
    """Tell whether ``checkpointed`` has an effect on the model, in train mode."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    switches = any(hasattr(module, "gradient_checkpointing") for module in base.modules())
    return switches and getattr(base, "supports_gradient_checkpointing", False)
