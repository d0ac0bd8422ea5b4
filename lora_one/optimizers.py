"""Any torch optimizer with LoRA gradients preconditioned before each step."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_one.errors import InputError
from lora_one.preconditioning import Pair, precondition_pairs


def lora_pairs(model: nn.Module) -> dict[str, Pair]:
    """Return the trainable (lora_A, lora_B) weights by name of the lora_A parameter.

    Raises:
        InputError: for sharded or flattened factors, whose Gram matrices no rank has.
    """
    parameters = dict(model.named_parameters())
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
                    "whole LoRA factors. Use DDP or ZeRO-1/2, or keep the adapters out of the "
                    "sharding (ignored parameters)."
                )
        if A.ndim == 2 and B.ndim == 2:
            pairs[name] = (A, B)
    return pairs


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
            optimised; those that are not such pairs (DoRA magnitudes, embeddings' adapters,
            ``modules_to_save``) by the base optimizer alone, see ``unpreconditioned``.
        optimizer_cls: such as ``torch.optim.AdamW``.
        lr: learning rate of the base optimizer.
        reg: damping d.
        relative: whether d is relative: ``reg`` times the mean eigenvalue of the Gram matrix.
        preconditioned: False gives ``optimizer_cls`` unchanged.
        kwargs: for ``optimizer_cls``.

    Returns:
        An instance of a subclass of ``optimizer_cls``; its attributes ``reg`` and ``relative``
        can be changed between steps, ``unpreconditioned`` names the other parameters.

    Raises:
        TypeError: if ``optimizer_cls`` is not an optimizer class.
        ValueError: without LoRA pairs, for optimizers that need a closure, for negative damping.
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
    if reg < 0:
        raise InputError(f"reg must not be negative, got {reg}.")
    pairs = lora_pairs(model)
    if not pairs:
        raise InputError(
            "create_preconditioned_optimizer found no trainable lora_A/lora_B pairs on the model; "
            "the preconditioner is defined for LoRA adapters of linear layers only."
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = _subclass(optimizer_cls)([p for _, p in named], lr=lr, **kwargs)
    in_pairs = {id(factor) for pair in pairs.values() for factor in pair}
    optimizer.reg, optimizer.relative, optimizer.preconditioned = reg, relative, preconditioned
    optimizer.unpreconditioned = [name for name, p in named if id(p) not in in_pairs]
    optimizer.lora_pairs = list(pairs.values())
    return optimizer


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
                precondition_pairs(self.lora_pairs, self.reg, relative=self.relative)
            return super().step()

    PreconditionedOptimizer.__name__ = f"Preconditioned{optimizer_cls.__name__}"
    return PreconditionedOptimizer
