"""See what flows into and out of a linear layer, and in the backward pass what comes back.

``W``'s gradient is ``sum over tokens of (output gradient) (input)ᵀ``. A tap hands both to an
accumulator in the backward pass, so no weight needs ``requires_grad``: it works on 4-bit, 8-bit
and sharded weights, and a layer's gradient can be used and dropped before the next one arrives.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from lora_one.errors import InputError
from lora_one.layers import TargetLayer, base_name, is_linear
from lora_one.numerics.outer_products import OuterProducts
from lora_one.numerics.precision import computing_dtype

Consumer = Callable[[str, Tensor, Tensor], None]


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; hands (input, output gradient) over in the backward pass.

    The input is saved with ``save_for_backward``, so activation checkpointing drops and
    recomputes it like every other activation. ``anchor`` requires a gradient, which makes the
    output require one even where nothing before it does (frozen embeddings).
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, name: str, consumer: Consumer
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.consumer = name, consumer
        return output.detach()  # not a view: the model may change its output in place

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.consumer(ctx.name, x, grad_output)
        return grad_output if ctx.needs_input_grad[0] else None, None, None, None, None


@contextmanager
def tapped(
    layers: Sequence[TargetLayer], consumer: Consumer, on_forward: Callable[[str], None]
) -> Iterator[None]:
    """Tap the layers while the context lasts.

    Args:
        layers: what to tap.
        consumer: called in the backward pass as ``consumer(name, input, output_gradient)``, once
            per time the layer ran.
        on_forward: called with the name each time a tapped layer runs (again under activation
            checkpointing, when it is recomputed).
    """
    with ExitStack() as stack:
        anchors: dict[torch.device, Tensor] = {}
        for layer in layers:
            hook = _make_hook(layer.name, consumer, on_forward, anchors)
            # Before the user's own hooks, which may change what W x is for.
            handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def checked_outputs(model: nn.Module) -> Iterator[None]:
    """Refuse adapted linear layers that return anything but ``W x + b``, before PEFT trips.

    Such are the routers of some mixtures of experts, which PEFT's ``"all-linear"`` adapts. With
    ``target_parameters`` PEFT adds to the weight instead, whatever the layer returns.

    Raises:
        InputError: in the forward pass, naming the layer.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
                continue
            base = module.get_base_layer()
            if is_linear(base):
                check = partial(_check_output, base_name(name).removeprefix("base_model.model."))
                stack.callback(base.register_forward_hook(check).remove)
        yield


def _check_output(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _require_tensor(name, module, output)


def _require_tensor(name: str, module: nn.Module, output: Any) -> None:
    if not isinstance(output, Tensor):
        raise InputError(
            f"layer '{name}' returns a {type(output).__name__} instead of W x + b (a "
            f"{type(module).__name__}); leave it out of the target modules."
        )


@contextmanager
def differentiable_inputs(model: nn.Module) -> Iterator[None]:
    """Let what enters a checkpointed block require a gradient while the context lasts.

    Reentrant activation checkpointing only records a block one of whose inputs requires one.
    """
    before = []
    try:
        for module in model.modules():
            function = vars(module).get("_gradient_checkpointing_func")
            if function is not None:
                before.append((module, function))
                module._gradient_checkpointing_func = partial(_run_differentiably, function)
        yield
    finally:
        for module, function in before:
            module._gradient_checkpointing_func = function


def _run_differentiably(
    checkpoint: Callable[..., Any], block: Callable[..., Any], *args: Any
) -> Any:
    """Run the block; if no input requires a gradient, the first does, its hidden states."""
    floating = [x for x in args if isinstance(x, Tensor) and x.is_floating_point()]
    if not any(x.requires_grad for x in floating):
        args = [x.detach().requires_grad_() if x is floating[0] else x for x in args]
    return checkpoint(block, *args)


def weight_gradient(x: Tensor, grad_output: Tensor) -> Tensor:
    """Return ``sum over tokens of grad_output xᵀ`` (out, in), summed in at least fp32.

    Half-precision operands are multiplied by CUDA's tensor cores with fp32 sums and an fp32
    result; elsewhere they are widened first, which gives the same numbers.
    """
    g, x = grad_output.flatten(0, -2), x.flatten(0, -2)
    half = (torch.bfloat16, torch.float16)
    if g.is_cuda and g.dtype == x.dtype and g.dtype in half:
        return torch.mm(g.T, x, out_dtype=torch.float32)
    dtype = computing_dtype(g, x)
    with torch.autocast(g.device.type, enabled=False):
        return g.T.to(dtype) @ x.to(dtype)


def unformed_gradient(x: Tensor, grad_output: Tensor) -> OuterProducts:
    """Return the same sum as the vectors that it consists of, in at least fp32."""
    g, x = grad_output.flatten(0, -2), x.flatten(0, -2)
    dtype = computing_dtype(g, x)
    return OuterProducts(g.to(dtype).contiguous(), x.to(dtype).contiguous())


def _make_hook(
    name: str,
    consumer: Consumer,
    on_forward: Callable[[str], None],
    anchors: dict[torch.device, Tensor],
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        _require_tensor(name, module, output)
        x = args[0] if args else next(iter(kwargs.values()))
        anchor = anchors.get(output.device)
        if anchor is None:
            anchor = torch.zeros((), device=output.device, requires_grad=True)
            anchors[output.device] = anchor
        on_forward(name)
        return _Tap.apply(output, x, anchor, name, consumer)

    return hook
