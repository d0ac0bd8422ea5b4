"""Rows of token ids in a few flat arrays."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

Packed = dict[str, list[int] | list[float]]


class PackedRows(Sequence[Packed]):
    """Rows of token ids in a few arrays; a row is unpacked when it is asked for.

    25 million tokens take 200 MB, and on disk until they are looked at; as lists of Python's
    integers they would take more than a gigabyte.

    Args:
        values: Per column (``input_ids``, ``labels``, ...), the values of all rows one after the
            other: int32, or float64 for scores.
        offsets: Per column, where each row begins, and the end of the last one.
    """

    def __init__(self, values: Mapping[str, np.ndarray], offsets: Mapping[str, np.ndarray]) -> None:
        self._values = dict(values)
        self._offsets = dict(offsets)

    def __len__(self) -> int:
        return len(self._offsets["input_ids"]) - 1

    @overload
    def __getitem__(self, index: int) -> Packed: ...

    @overload
    def __getitem__(self, index: slice) -> list[Packed]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return {
            column: values[slice(*self._offsets[column][position : position + 2])].tolist()
            for column, values in self._values.items()
        }

    def __iter__(self) -> Iterator[Packed]:
        return (self[index] for index in range(len(self)))

    def lengths(self, column: str) -> list[int]:
        """Return the number of ids in each row, without unpacking any."""
        return np.diff(self._offsets[column]).tolist()
