"""A statistic C (in, in) of what flows into each layer, by forward passes over the init batch.

``covariance``
    of the inputs x at supervised tokens, ``mean (x - μ)(x - μ)ᵀ`` (EVA); in an encoder, of all its
    tokens.
``second moment``
    ``mean over rows of X Xᵀ``, where a row's inputs X (in, tokens) are divided by their largest
    entry, and padding is left out (CorDA).

Both are that of all rows in one batch: sums over micro-batches and ranks are joined exactly. Where
a layer does not see the batch's own positions, as the experts of a mixture, all that reaches it
counts, as one row. Layers are taken in groups whose sums fit a budget, one pass each.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.errors import InputError, NonFiniteError
from lora_one.gradients.logits import promised_logits
from lora_one.gradients.plan import BUDGET, in_groups
from lora_one.gradients.restore import left_as_found
from lora_one.gradients.stream import Ranks, agreed_batches, smallest_over_ranks, together
from lora_one.gradients.tokens import IGNORED, Batch, to_device
from lora_one.layers import TargetLayer, computing_device, model_device
from lora_one.numerics.precision import full_precision


class Statistic:
    """Sums of one layer's inputs that can be joined: over micro-batches, and over ranks.

    Attributes:
        count: tokens, or rows of the second moment.
        mean: (n,) of the tokens; 0 for the second moment, which is about 0.
        scatter: (n, n), ``sum (x - mean)(x - mean)ᵀ``.
    """

    def __init__(self, layer: TargetLayer, *, centred: bool) -> None:
        n, device = layer.shape[1], computing_device(layer.module)
        weight = getattr(layer.module, "weight", None)  # some quantised layers have none
        wide = weight is not None and weight.dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
        self.centred = centred
        self.count = 0.0
        self.mean = torch.zeros(n, dtype=dtype, device=device)
        self.scatter = torch.zeros(n, n, dtype=dtype, device=device)

    def add(self, X: Tensor) -> None:
        """Add the inputs X (tokens, n) of one row, or of any number of tokens if centred."""
        if not len(X):
            return
        X = X.to(self.mean)
        if not self.centred:
            largest = X.abs().amax()
            if largest == 0:
                return
            X = X / largest
            self.count += 1
            self.scatter.addmm_(X.T, X)
            return
        mean = X.mean(0)
        total = self.count + len(X)
        shift = mean - self.mean
        X = X - mean
        # The update of Chan, Golub and LeVeque: no difference of large squares.
        self.scatter.addmm_(X.T, X)
        self.scatter.addr_(shift, shift, alpha=self.count * len(X) / total)
        self.mean += shift * (len(X) / total)
        self.count = total

    def join(self, ranks: Ranks) -> None:
        """Let the sums be those of all ranks."""
        count = float(ranks.add_up(self.mean.new_tensor([self.count], dtype=torch.float64)))
        if self.centred and count:
            mean = ranks.add_up(self.mean * (self.count / count))
            shift = self.mean - mean
            self.scatter.addr_(shift, shift, alpha=self.count)
            self.mean = mean
        self.scatter = ranks.add_up(self.scatter)
        self.count = count

    def of_rank(self, name: str, rank: int) -> Tensor:
        """Return C (n, n).

        Raises:
            InputError: for a covariance of fewer directions than the rank.
        """
        if self.centred and self.count <= rank:
            raise InputError(
                f"{self.count:.0f} supervised tokens reach layer '{name}', which vary in fewer "
                f"than {rank} directions. Give more init batches, or lower r."
            )
        return self.scatter / self.count


def stream_inputs(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Sequence[TargetLayer],
    consume: Callable[[str, Statistic], None],
    *,
    statistic: str,
    memory_budget: int | None = None,
) -> None:
    """Hand every layer's statistic to ``consume(name, statistic)``, in one order on all ranks.

    In evaluation mode, without dropout, as in the published codes; fp32 sums.

    Args:
        model: plain or ``PeftModel`` (whose adapters stay inactive); left as it was found.
        batches: keyword arguments of ``model``, labels included; each rank's own share.
        layers: the layers of interest; names are unique.
        consume: called once per layer; the count is 0 for a layer that no token reached.
        statistic: ``"covariance"`` or ``"second moment"``.
        memory_budget: bytes of sums at a time; None for ``plan.BUDGET``, or half of the memory that
            is free on a GPU.

    Raises:
        InputError: for unusable batches.
        NonFiniteError: for an input that is not finite, naming the layer.
    """
    centred, ranks = statistic == "covariance", together()
    counted = agreed_batches(model, batches)
    budget = _budget(model) if memory_budget is None else memory_budget
    for group in in_groups(layers, budget, lambda layer: 4 * layer.shape[1] ** 2):
        statistics = {
            x.name: Statistic(x, centred=centred)
            for x in sorted(group, key=lambda layer: layer.name)
        }
        _sweep(model, [batch for batch, _ in counted], group, statistics)
        for name in list(statistics):
            found = statistics.pop(name)
            if ranks is not None:
                found.join(ranks)
            if not found.scatter.isfinite().all():
                raise NonFiniteError(
                    f"an input of layer '{name}' is not finite. Try fp32 or bf16 weights, or look "
                    "at the init rows."
                )
            consume(name, found)


def _budget(model: nn.Module) -> int:
    """Return what all ranks have room for: each group of layers takes a pass over the batches."""
    device = model_device(model)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return int(smallest_over_ranks(max(BUDGET, free // 2), model))


def _sweep(
    model: nn.Module,
    batches: list[Batch],
    layers: Sequence[TargetLayer],
    statistics: dict[str, Statistic],
) -> None:
    masks: list[Tensor] = []
    device = model_device(model)
    supervised = next(iter(statistics.values())).centred
    two_sequences = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    with left_as_found(model, train=False), torch.no_grad(), ExitStack() as stack:
        stack.enter_context(promised_logits(model))
        for layer in layers:
            hook = _hook(statistics[layer.name], masks)
            # Before the user's own hooks, as the gradient's taps.
            handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            batch = to_device(batch, device)
            if two_sequences:
                batch = _of_two_lengths(batch)
            masks[:] = _positions(batch, supervised, two_sequences)
            model(**batch)


def _positions(batch: Batch, supervised: bool, two_sequences: bool) -> list[Tensor]:
    """Return which positions (rows, tokens) count: one mask per sequence, none where all do."""
    mask, labels = batch.get("attention_mask"), batch["labels"]
    attended = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    known = labels != IGNORED if labels.ndim == 2 else None
    if two_sequences:
        masks = [attended, known]
    elif not supervised or known is None:
        masks = [attended]
    elif attended is None:
        masks = [known]
    else:
        masks = [attended & known if attended.shape == known.shape else attended]
    return [mask for mask in masks if mask is not None]


def _of_two_lengths(batch: dict[str, Any]) -> dict[str, Any]:
    """Pad an encoder's tokens by one where the decoder has as many, so that lengths tell which."""
    tokens = batch.get("input_ids")
    if tokens is None or tokens.shape != batch["labels"].shape:
        return batch
    mask = batch.get("attention_mask")
    mask = torch.ones_like(tokens) if mask is None else mask
    pad = torch.nn.functional.pad
    return {**batch, "input_ids": pad(tokens, (0, 1)), "attention_mask": pad(mask, (0, 1))}


def _hook(
    statistic: Statistic, masks: list[Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        with torch.autocast(x.device.type, enabled=False), full_precision(x.device):
            for row in _rows(x, masks):
                statistic.add(row)

    return hook


def _rows(x: Tensor, masks: list[Tensor]) -> list[Tensor]:
    """Return the inputs (tokens, n) of each row, without the positions that do not count."""
    for mask in masks:
        # A layer may see all rows' tokens in one.
        if x.shape[:-1] in (mask.shape, mask.flatten().shape):
            rows = x.reshape(*mask.shape, -1)
            return [row[counts.to(x.device)] for row, counts in zip(rows, mask, strict=True)]
    return list(x) if x.ndim == 3 else [x.flatten(0, -2)]
