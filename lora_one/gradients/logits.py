"""Let the loss take the logits some tokens at a time, instead of all at once.

With a vocabulary of 32,000, the logits of 8 x 1024 tokens and what cross-entropy keeps beside them
take 4 GB in fp32. Here the head's output is a promise: a tensor that knows the hidden states and
the head. Where the model hands it to ``cross_entropy`` as it is, as transformers' language models
do, the loss and its gradient in the hidden states are computed chunk by chunk, and tokens whose
labels are ignored cost nothing. At any other use (soft capping, scaling, a loss of one's own) the
promise is kept: the logits are computed, and the model goes on with them as ever.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 8_000_000
"""Logits at a time: 32 MB in fp32, the most that the C library reuses without new pages."""


@contextmanager
def promised_logits(model: nn.Module) -> Iterator[None]:
    """Let the head promise its logits while the context lasts, where that changes nothing else.

    Heads with hooks, with a trainable or sharded weight, of another class than ``nn.Linear``, and
    those of compiled models are left alone.

    Args:
        model: frozen; a transformers model, plain or in PEFT's wrapper, for an effect.
    """
    head = _frozen_head(model)
    if head is None:
        yield
        return
    head.forward = lambda hidden: _promise(head, hidden)
    try:
        yield
    finally:
        del head.forward


def _promise(head: nn.Linear, hidden: Tensor) -> Tensor:
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if autocast or hidden.dtype != head.weight.dtype:
        return nn.Linear.forward(head, hidden)
    return PromisedLogits(hidden, head)


class PromisedLogits(Tensor):
    """``hidden Wᵀ + b`` (..., vocabulary), computed when an operation asks for it."""

    hidden: Tensor
    head: nn.Linear
    kept: Tensor | None

    @staticmethod
    def __new__(
        cls: type, hidden: Tensor, head: nn.Linear, dtype: torch.dtype | None = None
    ) -> "PromisedLogits":
        """Promise the head's output for hidden states (..., d), converted to ``dtype``."""
        shape = (*hidden.shape[:-1], head.out_features)
        dtype = hidden.dtype if dtype is None else dtype
        promise = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        promise.hidden, promise.head, promise.kept = hidden, head, None
        return promise

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        deferred = args and isinstance(args[0], cls) and args[0].kept is None
        if deferred and function in _DEFERRED:
            result = _DEFERRED[function](*args, **kwargs)
            if result is not None:
                return result
        args = [_keep(value) for value in args]
        return function(*args, **{name: _keep(value) for name, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, function: Callable[..., Any], *rest: Any) -> Any:
        # Below autograd, where keeping the promise would cut the graph. No Python code gets here.
        raise RuntimeError(f"{function} met logits that were only promised.")


def _keep(value: Any) -> Any:
    """Return the logits for a promise, anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(_keep(item) for item in value)
    if not isinstance(value, PromisedLogits):
        return value
    if value.kept is None:
        value.kept = nn.Linear.forward(value.head, value.hidden).to(value.dtype)
    return value.kept


def _float(logits: PromisedLogits) -> PromisedLogits:
    return PromisedLogits(logits.hidden, logits.head, torch.float32)


def _view(logits: PromisedLogits, *shape: Any) -> PromisedLogits | None:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
    if not isinstance(sizes[-1], int) or sizes[-1] != logits.head.out_features:
        return None
    hidden = logits.hidden.reshape(*sizes[:-1], logits.hidden.shape[-1])
    return PromisedLogits(hidden, logits.head, logits.dtype)


def _cross_entropy(
    logits: PromisedLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    simple = weight is None and size_average is None and reduce is None and not label_smoothing
    classes = logits.ndim == 2 and target.ndim == 1 and not target.is_floating_point()
    if not (simple and classes and reduction in ("mean", "sum")):
        return None
    counts = target != ignore_index
    loss = _ChunkedCrossEntropy.apply(
        logits.hidden[counts], target[counts], logits.head.weight, logits.head.bias
    )
    return loss / counts.sum() if reduction == "mean" else loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """``Σ_t log Σ_v exp(l_tv) - l_ty``, ``l = h Wᵀ + b``; its gradient ``(softmax(l) - 1_y) W``.

    Logits are of the weight's dtype, as the head computes them; what follows is in at least fp32.
    The gradient in h is computed on the way, so that no logits wait for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        vocabulary = weight.shape[0]
        rows = max(CHUNK // vocabulary, 1)
        buffer = hidden.new_empty(min(rows, len(hidden)), vocabulary, dtype=wide)
        loss = hidden.new_zeros((), dtype=wide)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            h, y = hidden[chunk], target[chunk, None]
            logits = buffer[: len(h)]
            _linear(h, weight, bias, out=logits)
            chosen = logits.gather(1, y)
            largest = logits.amax(1, keepdim=True)
            total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            loss += (total.log() + largest - chosen).sum()
            if gradient is not None:
                logits.div_(total).scatter_add_(1, y, -torch.ones_like(total))
                gradient[chunk] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None, None


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    if out.dtype != weight.dtype:
        out.copy_(functional.linear(h, weight, bias))
    elif bias is None:
        torch.mm(h, weight.T, out=out)
    else:
        torch.addmm(bias, h, weight.T, out=out)


_DEFERRED = {Tensor.float: _float, Tensor.view: _view, functional.cross_entropy: _cross_entropy}
_LOOKS = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.ndim.__get__,
    Tensor.size,
    Tensor.dim,
}


def _frozen_head(model: nn.Module) -> nn.Linear | None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return None
    hooks = (
        head._forward_hooks,
        head._forward_pre_hooks,
        head._backward_hooks,
        head._backward_pre_hooks,
    )
    compiled = any(module._compiled_call_impl is not None for module in (model, base, head))
    sharded = hasattr(head.weight, "ds_id")
    trained = any(parameter.requires_grad for parameter in head.parameters())
    left_alone = any(hooks) or "forward" in vars(head) or compiled or sharded or trained
    return None if left_alone else head
