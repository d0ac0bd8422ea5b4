"""What the ranks of one command tell each other."""

from typing import Any


def share(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    return value


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order, on every rank."""
    return [value]
