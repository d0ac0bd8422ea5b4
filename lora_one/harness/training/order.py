"""Which rows a step is made of: the same ones on any number of ranks, and each once an epoch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, Sampler

from lora_one.tasks.encoding import IGNORED, EncodedRows
from lora_one.tasks.packed import Packed


class FilledRows(Dataset[Packed]):
    """Rows, and one that is blank behind them: a token that nothing is learnt from."""

    def __init__(self, rows: EncodedRows) -> None:
        self._rows = rows
        first = {column: values[:1] for column, values in rows[0].items()}
        self._blank = first | {"labels": [IGNORED]}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Packed:
        return self._rows[index] if index < len(self._rows) else self._blank


class Order(Sampler[int]):
    """A permutation that follows from seed and epoch, then blank rows for the ranks that lack some.

    Without them accelerate would fill the last micro-batches of an epoch with its first rows, so
    that the ranks have as many.

    Args:
        rows: How many there are; this index stands for a blank one.
        per_pass: How many all ranks take together in one forward pass.
        seed: Of the first epoch; the others have the numbers that follow.
    """

    def __init__(self, rows: int, per_pass: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._blank = -rows % per_pass
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        yield from torch.randperm(self._rows, generator=generator).tolist()
        yield from [self._rows] * self._blank

    def __len__(self) -> int:
        return self._rows + self._blank
