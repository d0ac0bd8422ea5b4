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
from torch.utils._pytree import tree_map_only

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
    head.forward = lambda hidden: _forward(head, hidden)
    try:
        yield
    finally:
        del head.forward


def _forward(head: nn.Linear, hidden: Tensor) -> Tensor:
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if autocast or hidden.dtype != head.weight.dtype:
        return nn.Linear.forward(head, hidden)
    return promise(hidden, head)


def promise(hidden: Tensor, head: nn.Linear, dtype: torch.dtype | None = None) -> "PromisedLogits":
    """Promise the head's output for hidden states (..., d), converted to ``dtype``."""
    return _Promise.apply(hidden, head, dtype)


class _Promise(torch.autograd.Function):
    """Ties a promise to its hidden states, for what autograd sees of it and Python does not.

    So it is with a loss that is itself an ``autograd.Function``, as fused ones are.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: nn.Linear, dtype: torch.dtype | None
    ) -> "PromisedLogits":
        ctx.weight = head.weight
        return PromisedLogits(hidden, head, hidden.dtype if dtype is None else dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output.to(ctx.weight.dtype) @ ctx.weight, None, None


class _Keep(torch.autograd.Function):
    """The logits of a promise. Saves nothing, so that a checkpointed loss may be the first look."""

    @staticmethod
    def forward(ctx: Any, logits: "PromisedLogits") -> Tensor:
        return nn.Linear.forward(logits.head, logits.hidden).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output


class PromisedLogits(Tensor):
    """``hidden Wᵀ + b`` (..., vocabulary), computed when an operation asks for it."""

    hidden: Tensor
    head: nn.Linear
    kept: Tensor | None
    base: "PromisedLogits | None"

    @staticmethod
    def __new__(cls: type, hidden: Tensor, head: nn.Linear, dtype: torch.dtype) -> "PromisedLogits":
        """Return a promise without a history; see ``promise``."""
        shape = (*hidden.shape[:-1], head.out_features)
        new = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        new.hidden, new.head, new.kept, new.base = hidden, head, None, None
        return new

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
        deferred = args and isinstance(args[0], cls) and _root(args[0]).kept is None
        if deferred and function in _DEFERRED:
            result = _DEFERRED[function](*args, **kwargs)
            if result is not None:
                return result
        args = [_keep(value) for value in args]
        return function(*args, **{name: _keep(value) for name, value in kwargs.items()})

    @classmethod
    def __torch_dispatch__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Below autograd, which has seen the promise: its history is that of _Promise.
        args, kwargs = tree_map_only(
            PromisedLogits, lambda value: _keep(value).detach(), (args, kwargs or {})
        )
        return function(*args, **kwargs)


def _keep(value: Any) -> Any:
    """Return the logits for a promise, anything else as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(_keep(item) for item in value)
    if not isinstance(value, PromisedLogits):
        return value
    if value.kept is None and value.base is not None:
        value.kept = _keep(value.base).view(value.shape)  # changes in place are to both
    elif value.kept is None:
        # With a history even where a metric without one is the first to look at them.
        with torch.set_grad_enabled(value.hidden.requires_grad):
            value.kept = _Keep.apply(value)
    return value.kept


def _root(logits: PromisedLogits) -> PromisedLogits:
    """Return the promise of which this is a view, or itself."""
    return logits if logits.base is None else logits.base


def _float(logits: PromisedLogits, **options: Any) -> PromisedLogits | None:
    if options:
        return None
    if logits.dtype == torch.float32:
        return logits
    return promise(logits.hidden, logits.head, torch.float32)


def _view(logits: PromisedLogits, *shape: Any, **options: Any) -> PromisedLogits | None:
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (list, tuple)) else shape
    rows, last = sizes[:-1], sizes[-1:]
    if options or tuple(last) != (logits.head.out_features,):
        return None
    hidden = logits.hidden.reshape(*rows, logits.hidden.shape[-1])
    view = promise(hidden, logits.head, logits.dtype)
    view.base = _root(logits)
    return view


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
    ways = (model, base, head)
    changed = any(m._compiled_call_impl is not None or "forward" in vars(m) for m in ways)
    sharded = hasattr(head.weight, "ds_id")
    trained = any(parameter.requires_grad for parameter in head.parameters())
    left_alone = any(hooks) or changed or sharded or trained
    return None if left_alone else head
