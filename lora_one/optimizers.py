"""Any torch optimizer with LoRA gradients preconditioned before each step."""

import functools
import inspect
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import BlockDiagonalLinear
from torch import nn
from torch.optim import Optimizer

from lora_one.errors import InputError
from lora_one.narrow_products import Pair, start_compiling
from lora_one.preconditioning import precondition_pairs


def lora_pairs(model: nn.Module) -> dict[str, Pair]:
    """Return the trainable (lora_A, lora_B) weights by name of the lora_A parameter.

    A (r, n) and B (m, r) are one pair if ``B A`` is the layer's product. Not so where PEFT keeps
    several products in one parameter: experts (``target_parameters``) and BD-LoRA.

    Raises:
        InputError: for sharded or flattened factors, whose Gram matrices no rank has.
    """
    parameters = dict(model.named_parameters())
    in_blocks = _factors_in_blocks(model)
    pairs = {}
    for name, A in parameters.items():
        if ".lora_A." not in name or not name.endswith(".weight"):
            continue
        B = parameters.get(name.replace(".lora_A.", ".lora_B."))
        if B is None or not (A.requires_grad and B.requires_grad):
            continue
        for factor in (A, B):
            if hasattr(factor, "placements") or hasattr(factor, "ds_id") or factor.numel() == 0:
                raise InputError(
                    f"'{name}' is sharded or flattened (FSDP or ZeRO-3); the preconditioner needs "
                    "whole LoRA factors. Use DDP, or keep the adapters out of the sharding "
                    "(ignored parameters)."
                )
        fit = A.ndim == B.ndim == 2 and B.shape[1] == A.shape[0]
        if fit and not in_blocks & {id(A), id(B)}:
            pairs[name] = (A, B)
    return pairs


def _factors_in_blocks(model: nn.Module) -> set[int]:
    """Return by ``id`` the factors that are stacked or block-diagonal: one Gram matrix a block."""
    factors: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, BlockDiagonalLinear):
            factors.append(module.weight)
        elif isinstance(module, ParamWrapper) and module.num_experts > 1:
            factors += [*module.lora_A.parameters(), *module.lora_B.parameters()]
    return {id(factor) for factor in factors}


def create_preconditioned_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    reg: float = 1e-6,
    relative: bool = False,
    preconditioned: bool = True,
    **kwargs: Any,
) -> Optimizer:
    """Return an ``optimizer_cls`` that steps along preconditioned LoRA gradients.

    Before each step, with the factors as they are before the step, in at least fp32::

        g_A <- (Bᵀ B + d I)⁻¹ g_A        g_B <- g_B (A Aᵀ + d I)⁻¹

    (scaled gradient descent; Zhang and Pilanci 2024 for LoRA; LoRA-One with d = 1e-6). The base
    optimizer's moments are taken of these gradients. The call shape and the errors are those of
    PEFT's ``create_riemannian_optimizer``. Gradients are overwritten in place, after whatever
    clipping or unscaling came before ``step``; the state and its ``state_dict`` are exactly those
    of ``optimizer_cls``.

    Args:
        model: with trainable ``lora_A`` / ``lora_B`` weights. All its trainable parameters are
            optimised; those that are not such pairs (DoRA magnitudes, adapters of embeddings and
            of stacked experts, BD-LoRA, ``modules_to_save``) by the base optimizer alone, see
            ``unpreconditioned``.
        optimizer_cls: such as ``torch.optim.AdamW``.
        lr: learning rate of the base optimizer.
        reg: damping d. With 0 a factor that is zero, as B at LoRA's own start, is an error.
        relative: whether d is relative: ``reg`` times the mean eigenvalue of the Gram matrix.
        preconditioned: False steps exactly as ``optimizer_cls`` does; closures and models
            without pairs are refused all the same.
        kwargs: for ``optimizer_cls``.

    Returns:
        An instance of a subclass of ``optimizer_cls``; its attributes ``reg`` and ``relative``
        can be changed between steps, ``unpreconditioned`` names the other parameters. What
        ``add_param_group`` adds later is left to the base optimizer and in neither list: make a
        new optimizer for a new adapter.

    Raises:
        TypeError: if ``optimizer_cls`` is not an optimizer class.
        ValueError: without LoRA pairs, for optimizers that need a closure, for a damping that is
            negative or not finite; from ``step`` if a factor is in no parameter group any more,
            as accelerate's FSDP2 and DeepSpeed ZeRO leave it.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(
            f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}."
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(
            f"{optimizer_cls.__name__} requires a closure and evaluates the objective inside "
            "step(), where preconditioned gradients would be lost. Use an optimizer with an "
            "optional closure, such as AdamW or SGD."
        )
    if not (math.isfinite(reg) and reg >= 0):
        raise InputError(f"reg must not be negative, infinite or NaN, got {reg}.")
    pairs = lora_pairs(model)
    if not pairs:
        raise InputError(
            "create_preconditioned_optimizer found no trainable lora_A/lora_B pairs on the model; "
            "the preconditioner is defined for LoRA adapters of linear layers only. Both factors "
            "need requires_grad; PeftModel.from_pretrained gives it with is_trainable=True."
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = _subclass(optimizer_cls)([p for _, p in named], lr=lr, **kwargs)
    in_pairs = {id(factor) for pair in pairs.values() for factor in pair}
    optimizer.reg, optimizer.relative, optimizer.preconditioned = reg, relative, preconditioned
    optimizer.unpreconditioned = [name for name, p in named if id(p) not in in_pairs]
    optimizer.lora_pairs = list(pairs.values())
    if preconditioned:
        start_compiling(optimizer.lora_pairs)
    return optimizer


@functools.cache
def _subclass(optimizer_cls: type[Optimizer]) -> type[Optimizer]:
    class PreconditionedOptimizer(optimizer_cls):
        """``optimizer_cls`` on preconditioned gradients."""

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Precondition the LoRA gradients in place, then do the base optimizer's step."""
            if closure is not None:
                raise InputError(
                    "the preconditioned optimizer does not support closures: they evaluate the "
                    "objective inside step() and would overwrite the preconditioned gradients."
                )
            if self.preconditioned:
                _check_held(self)
                precondition_pairs(self.lora_pairs, self.reg, relative=self.relative)
            # torch runs the hooks of a step around this method, and again around the base class's
            # once that has had an instance of its own.
            base_step = optimizer_cls.step
            if getattr(base_step, "hooked", False) and _is_torchs(base_step):
                base_step = base_step.__wrapped__
            return base_step(self)

        def __getstate__(self) -> dict[str, Any]:
            own = ("reg", "relative", "preconditioned", "unpreconditioned", "lora_pairs")
            return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

        def __reduce__(self) -> tuple[Any, ...]:
            return _empty, (optimizer_cls,), self.__getstate__()

    PreconditionedOptimizer.__name__ = f"Preconditioned{optimizer_cls.__name__}"
    return PreconditionedOptimizer


def _is_torchs(function: Callable[..., Any]) -> bool:
    """Tell a wrapper of ``torch.optim`` from a user's that ``functools.wraps`` makes look alike."""
    return function.__code__.co_filename == Optimizer.__init__.__code__.co_filename


def _empty(optimizer_cls: type[Optimizer]) -> Optimizer:
    """Return what a copy or a pickle is filled into: pickle finds no class made in a function."""
    subclass = _subclass(optimizer_cls)
    return subclass.__new__(subclass)


def _check_held(optimizer: Optimizer) -> None:
    """Raise ``InputError`` unless the base optimizer steps the very factors of the pairs."""
    held = set(map(id, chain.from_iterable(group["params"] for group in optimizer.param_groups)))
    if not held.issuperset(map(id, chain.from_iterable(optimizer.lora_pairs))):
        raise InputError(
            "the optimizer no longer holds the LoRA factors that it preconditions: they were "
            "sharded or flattened (FSDP, DeepSpeed ZeRO), or taken out of param_groups. Use DDP, "
            "or make the optimizer from the model as it is to be trained."
        )
