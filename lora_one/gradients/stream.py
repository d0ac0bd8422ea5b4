"""Run the init batch and hand out each layer's mean gradient as soon as it is complete.

``plan.py`` says which micro-batches and layers are run together; here they are run. Under
``torch.distributed`` each complete sum is added up over the ranks before it is handed out, in the
same order on every rank, so all ranks see the same gradients; unless the consumer adds up itself.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_one.errors import InputError, NonFiniteError
from lora_one.gradients.logits import promised_logits
from lora_one.gradients.plan import plan
from lora_one.gradients.restore import checkpointed, left_as_found
from lora_one.gradients.tap import (
    checked_outputs,
    differentiable_inputs,
    tapped,
    unformed_gradient,
    weight_gradient,
)
from lora_one.gradients.tokens import Batch, checked_batches, to_device
from lora_one.layers import TargetLayer, computing_device, model_device
from lora_one.numerics.outer_products import OuterProducts
from lora_one.sharding import is_sharded


@dataclass
class Sweep:
    """What was seen of the init batch: mean loss, supervised tokens, and the strategy used."""

    loss: float
    tokens: int
    strategy: str


def stream_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[TargetLayer],
    consume: Callable[[str, Tensor | OuterProducts], None],
    *,
    train: bool = True,
    seed: int | None = None,
    strategy: str = "auto",
    memory_budget: int | None = None,
    device: torch.device | str | None = None,
    add_up: bool = True,
    unformed: Collection[str] = (),
) -> Sweep:
    """Hand every layer's mean gradient (out, in), fp32, to ``consume(name, gradient)``.

    The mean is over supervised tokens, ``sum_i n_i g_i / sum_i n_i`` over micro-batches and
    ranks. What is differentiated is the model's loss times its number of tokens; the sum also
    keeps fp16 gradients away from underflow.

    Args:
        model: plain or ``PeftModel`` (whose adapters stay inactive); left as it was found.
        batches: keyword arguments of ``model``, labels included; each rank's own share.
        layers: the layers of interest; names are unique.
        consume: called once per layer; a layer that no token reached is handed a zero gradient.
        train: whether dropout is active.
        seed: seeds dropout; ``None`` continues the global random numbers (and restores them).
        strategy: see ``plan.py``.
        memory_budget: bytes of gradients that may wait for later micro-batches.
        device: where sums are kept and handed out; ``None`` for the layer's own device.
        add_up: False hands out this rank's summand of every mean gradient instead: in the same
            order on every rank, so that ``consume`` may add up over ranks what it makes of them.
        unformed: names of layers whose gradient may come as ``OuterProducts``, good until
            ``consume`` returns, where nothing is added to it: one run of the layer in one
            micro-batch. So it comes on CPUs; on GPUs tensor cores form it for less. Needs
            ``add_up=False`` and no ``device``.

    Raises:
        InputError: for batches without anything to learn from (on any rank), a model that returns
            no loss, or under ``torch.inference_mode``.
        NonFiniteError: for a loss that is not finite.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "no gradient can be taken under torch.inference_mode(); leave it first. Under "
            "torch.no_grad() it can."
        )
    counted = agreed_batches(model, batches)
    several = _largest_over_ranks(len(counted), model) > 1
    todo = plan(
        model,
        counted,
        layers,
        strategy=strategy,
        budget=memory_budget,
        train=train,
        several=several,
        everywhere=lambda holds: not _largest_over_ranks(not holds, model),
    )
    total = int(_sum_over_ranks(sum(tokens for _, tokens in todo.batches), model))
    place = None if device is None else torch.device(device)
    loss = float("nan")
    ranks = together()

    def deliver(name: str, gradient: Tensor | OuterProducts) -> None:
        gradient /= total  # in place where it was formed
        consume(name, ranks.add_up(gradient) if add_up and ranks else gradient)

    for index, group in enumerate(todo.groups):
        sums = _Sums(group, deliver, place, unformed)
        with left_as_found(model, train=train, seed=seed), ExitStack() as stack:
            if todo.checkpointing:
                stack.enter_context(checkpointed(model))
            loss_sum = _sweep(model, todo.batches, group, sums)
        sums.hand_out_the_rest()
        if index == 0:
            loss = _sum_over_ranks(loss_sum, model) / total
            if not abs(loss) < float("inf"):
                raise NonFiniteError(f"the mean loss of the init batches is {loss}.")
    return Sweep(loss, total, todo.strategy)


def mean_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    train: bool = True,
    seed: int | None = None,
    adapters: bool = True,
) -> float:
    """Return the token-weighted mean loss of the batches, by forward passes only.

    With ``train``, the model's own dropout is active as in the gradient's pass, the adapters'
    dropout is not.
    """
    counted = agreed_batches(model, batches)
    loss_sum, device = 0.0, model_device(model)
    with left_as_found(model, train=train, seed=seed, adapters=adapters), torch.no_grad():
        for name, module in model.named_modules():
            if ".lora_dropout" in name:
                module.eval()
        for batch, tokens in counted:
            with checked_outputs(model), promised_logits(model):
                loss = _loss(model, to_device(batch, device))
            loss_sum += float(loss) * tokens
    total = _sum_over_ranks(sum(tokens for _, tokens in counted), model)
    return _sum_over_ranks(loss_sum, model) / total


def agreed_batches(model: nn.Module, batches: Iterable[Batch]) -> list[tuple[Batch, int]]:
    """Return ``checked_batches``; if one rank's are unusable, every rank raises.

    So it does if a forward pass takes all ranks (FSDP2) and one has fewer batches than another.
    """
    counted, error = [], None
    try:
        counted = checked_batches(model, batches)
    except InputError as problem:
        error = problem
    if _largest_over_ranks(float(error is not None), model):
        raise error or InputError("the init batches of another rank cannot be used.")
    if is_sharded(model):
        fewest = smallest_over_ranks(len(counted), model)
        most = _largest_over_ranks(len(counted), model)
        if fewest != most:
            raise InputError(
                f"the model is sharded by FSDP, so that every forward pass takes all ranks, and "
                f"one has {fewest:g} init batches with supervised tokens, another {most:g}. Give "
                "every rank the same number."
            )
    return counted


class _Sums:
    """Adds up a group of layers' gradients and hands each out once, when it is complete."""

    def __init__(
        self,
        layers: Sequence[TargetLayer],
        deliver: Callable[[str, Tensor | OuterProducts], None],
        device: torch.device | None,
        unformed: Collection[str],
    ) -> None:
        self.missing = {layer.name: layer for layer in layers}
        self.deliver, self.device, self.unformed = deliver, device, unformed
        self.sums: dict[str, Tensor | OuterProducts] = {}
        self.pending: Counter[str] = Counter()
        self.in_backward = self.at_once = False

    def on_forward(self, name: str) -> None:
        if not self.in_backward:  # a recomputed forward pass promises no second gradient
            self.pending[name] += 1

    @torch.no_grad()
    def add(self, name: str, x: Tensor, grad_output: Tensor) -> None:
        self.pending[name] -= 1
        complete = self.at_once and not self.pending[name]
        alone = complete and name not in self.sums
        if alone and name in self.unformed and grad_output.device.type == "cpu":
            self.sums[name] = unformed_gradient(x, grad_output)
        else:
            gradient = weight_gradient(x, grad_output)
            if self.device is not None:
                gradient = gradient.to(self.device)
            if name in self.sums:
                self.sums[name] += gradient
            else:
                self.sums[name] = gradient
        if complete:
            self._hand_out(name)

    def hand_out_the_rest(self) -> None:
        """Hand out what the last backward pass did not complete, in one order on all ranks."""
        for name in sorted(self.missing):
            self._hand_out(name)

    def _hand_out(self, name: str) -> None:
        layer = self.missing.pop(name)
        gradient = self.sums.pop(name, None)
        if gradient is None:
            place = self.device or computing_device(layer.module)
            gradient = torch.zeros(layer.shape, device=place)
        with torch.autocast(gradient.device.type, enabled=False):
            self.deliver(name, gradient)


def _sweep(
    model: nn.Module, counted: list[tuple[Batch, int]], group: Sequence[TargetLayer], sums: _Sums
) -> float:
    """Run forward and backward over all micro-batches; return the sum of the tokens' losses."""
    loss_sum, device = 0.0, model_device(model)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(tapped(group, sums.add, sums.on_forward))
        stack.enter_context(promised_logits(model))
        if _is_reentrant(model):
            stack.enter_context(differentiable_inputs(model))
        for index, (batch, tokens) in enumerate(counted):
            sums.pending.clear()
            loss = _loss(model, to_device(batch, device)) * tokens
            value = loss.item()
            if not abs(value) < float("inf") and together() is None:
                raise NonFiniteError(f"the loss of init batch {index} is {value / tokens}.")
            if index == len(counted) - 1:
                sums.at_once = _ranks_agree(sums.pending, model)
            sums.in_backward = True
            if loss.requires_grad or sums.pending:  # else the batch reaches none of the layers
                loss.backward()
            sums.in_backward = False
            del loss
            loss_sum += value
    return loss_sum


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch)
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss"):
        loss = output.loss
    else:
        loss = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        raise InputError(
            f"{type(base).__name__} returned no loss for a batch with labels; expected a model "
            "with a head, such as one of AutoModelForCausalLM, which returns it as 'loss'."
        )
    return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss


def _is_reentrant(model: nn.Module) -> bool:
    """Whether activation checkpointing is on in its reentrant form."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and function is not None:
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False


class Ranks:
    """The ranks of ``torch.distributed``, as ``truncated_svd`` wants them."""

    def add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks; a contiguous tensor is overwritten by it."""
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
        return tensor

    def agree(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor; a contiguous one is overwritten by it."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
        return tensor


def together() -> Ranks | None:
    """Return the ranks that share the init batch, or None in a single process."""
    return Ranks() if dist.is_available() and dist.is_initialized() else None


def _ranks_agree(pending: Counter[str], model: nn.Module) -> bool:
    """Whether all ranks ran the same layers equally often, so that their backward passes match."""
    if together() is None:
        return True
    mark = float(zlib.crc32(repr(list(pending.items())).encode()))
    return _largest_over_ranks(mark, model) == smallest_over_ranks(mark, model)


def _sum_over_ranks(value: float, model: nn.Module) -> float:
    return _over_ranks(value, model, "SUM")


def _largest_over_ranks(value: float, model: nn.Module) -> float:
    return _over_ranks(value, model, "MAX")


def smallest_over_ranks(value: float, model: nn.Module) -> float:
    """Return the smallest value that a rank has; the own one in a single process."""
    return _over_ranks(value, model, "MIN")


def _over_ranks(value: float, model: nn.Module, operation: str) -> float:
    if together() is None:
        return value
    total = torch.tensor(float(value), dtype=torch.float64, device=model_device(model))
    dist.all_reduce(total, getattr(dist.ReduceOp, operation))
    return float(total)
