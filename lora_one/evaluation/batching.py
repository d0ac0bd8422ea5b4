"""How many rows are decoded together: as told, or as many as fit into memory.

``auto`` divides a budget by what a row needs at its full length, prompt and longest reply: the
keys and values of all layers. The budget is half of the memory that is free on a GPU and 1 GiB on
a CPU; at most 256 rows on a GPU and 128 on a CPU, where more are no faster. Batches come longest
first, so that later ones take more rows. What a GPU cannot hold nevertheless is tried again with
half the rows, and so are all batches after it. A model whose config names no attention heads, such
as Mamba, keeps something else than keys and values, which is not known here: it gets 16 rows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import nn

from lora_one.evaluation.mode import input_device
from lora_one.sharding import is_sharded

AUTO = "auto"
BatchSize = int | Literal["auto"]
Result = TypeVar("Result")

CPU_BUDGET = 1 << 30
MOST_ROWS = {"cpu": 128, "cuda": 256}
SHARE_OF_FREE_MEMORY = 0.5
CHOICE_ROWS = 16
ROWS_WITHOUT_HEADS = 16


class Batches:
    """Cuts jobs into batches and works them off.

    Args:
        model: What the batches are for: says where memory is needed, and how much.
        batch_size: Rows in a batch, or ``auto``.
    """

    def __init__(self, model: nn.Module, batch_size: BatchSize) -> None:
        self._model = model
        self._fixed = None if batch_size == AUTO else batch_size
        self._device = input_device(model)
        self._most = self._fixed or MOST_ROWS.get(self._device.type, MOST_ROWS["cpu"])
        self._budget = _budget(self._device) if self._fixed is None else 0

    def run(
        self,
        jobs: Sequence[int],
        lengths: Sequence[int],
        work: Callable[[Sequence[int]], Result],
    ) -> Iterator[tuple[Sequence[int], Result]]:
        """Yield each batch of jobs and what ``work`` made of it.

        Args:
            jobs: What to work off, the longest first.
            lengths: Tokens of each job at its full length, prompt and reply.
            work: Does one batch.

        Raises:
            torch.OutOfMemoryError: One row alone does not fit, or as many as were asked for.
        """
        start = 0
        while start < len(jobs):
            batch = jobs[start : start + self._rows(lengths[start])]
            result, failure = None, None
            try:
                result = work(batch)
            except torch.OutOfMemoryError as error:
                if self._fixed is not None:
                    error.add_note("Give a smaller evaluation.batch_size, or auto.")
                elif is_sharded(self._model):
                    # The other ranks are in the middle of this forward pass.
                    error.add_note("Give a small evaluation.batch_size.")
                    raise
                if self._fixed is not None or len(batch) == 1:
                    raise
                failure = str(error)
            # Outside the except block, whose traceback would keep the failed batch alive.
            if failure is not None:
                self._most = len(batch) // 2
                torch.cuda.empty_cache()
                continue
            yield batch, result
            start += len(batch)

    def _rows(self, length: int) -> int:
        if self._fixed is not None:
            return self._fixed
        needed = bytes_per_token(self._model)
        if needed is None:
            return min(self._most, ROWS_WITHOUT_HEADS)
        fitting = self._budget // (length * needed)
        return max(1, min(self._most, fitting))


def bytes_per_token(model: nn.Module) -> int | None:
    """Return the bytes of keys and values that one token of one row takes in all layers.

    None for a model without attention heads.

    An encoder-decoder keeps keys and values of its own tokens and of the source's: each token is
    one or the other, so the count is the same.
    """
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        return None
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    width = width or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    layers = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    return 2 * layers * shared * width * model.get_input_embeddings().weight.element_size()


def _budget(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_BUDGET
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(SHARE_OF_FREE_MEMORY * free)


def choice_rows(batch_size: BatchSize) -> int:
    """Return the rows of a forward pass that compares choices, which keeps no keys and values.

    It needs logits and activations of whole prompts instead, so ``auto`` is a modest number.
    """
    return CHOICE_ROWS if batch_size == AUTO else batch_size
