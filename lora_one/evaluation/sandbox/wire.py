"""What passes between the examiner and the candidate: frames of JSON that hold plain values.

No pickle and no marshal: the examiner reads what the candidate wrote, and neither survives a
hostile writer. A value that is not plain data travels as a reference, a number that only its owner
can turn back into the object.
"""

import json
import os
import struct
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

_HEADER = struct.Struct(">I")
_LARGE_INT = 1 << 4096  # decimal conversion of much larger ones is slow, and forbidden by Python


class ProtocolError(Exception):
    """The other side sent something that is no message."""


def send(fd: int, message: Any) -> None:
    """Write one message; raises OSError when the other side is gone."""
    data = json.dumps(message).encode()
    view = memoryview(_HEADER.pack(len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int, limit: int) -> Any:
    """Read one message of at most ``limit`` bytes.

    Raises:
        EOFError: The other side closed the pipe.
        ProtocolError: The message is too long or malformed.
    """
    (length,) = _HEADER.unpack(_read(fd, _HEADER.size))
    if length > limit:
        raise ProtocolError(f"a message of {length} bytes; the limit is {limit}")
    try:
        return json.loads(_read(fd, length))
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a malformed message ({error})") from None


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """Turn a value into JSON; subclasses that are not named here become their plain base.

    Args:
        value: Anything.
        refer: Gives the number of an object that is not plain data.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        plain = int(value)
        return plain if abs(plain) < _LARGE_INT else {"int": hex(plain)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [encode(item, refer) for item in value]
    for kind in (tuple, set, frozenset, deque):
        if isinstance(value, kind):
            items = [encode(item, refer) for item in value]
            fields = _fields(value)
            return {"namedtuple": [*fields, items]} if fields else {kind.__name__: items}
    if isinstance(value, dict):
        kind = type(value) if type(value) in (Counter, OrderedDict) else dict
        items = [[encode(k, refer), encode(v, refer)] for k, v in value.items()]
        return {kind.__name__: items}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if type(value) is range:
        return {"range": [value.start, value.stop, value.step]}
    # By name: a program that holds one has imported its module, and others need not.
    write = _PLAIN_OBJECTS.get((type(value).__module__, type(value).__name__))
    if write is not None:
        return {type(value).__name__: write(value)}
    return {"reference": refer(value)}


def decode(message: Any, resolve: Callable[[int], Any]) -> Any:
    """Undo ``encode``.

    Args:
        message: What ``receive`` returned, or a part of it.
        resolve: Turns the number of a reference into an object.

    Raises:
        ProtocolError: This is nothing that ``encode`` makes.
    """
    if isinstance(message, list):
        return [decode(item, resolve) for item in message]
    if not isinstance(message, dict):
        return message
    try:
        ((kind, content),) = message.items()
        if kind in _DICTS:
            return _DICTS[kind]({decode(k, resolve): decode(v, resolve) for k, v in content})
        if kind == "namedtuple":
            name, fields, items = content
            # ``namedtuple`` itself refuses names that are no identifiers.
            return _namedtuple(name, tuple(fields))(*(decode(item, resolve) for item in items))
        if kind == "reference":
            return resolve(int(content))
        if kind in _FROM_ITEMS:
            return _FROM_ITEMS[kind](decode(item, resolve) for item in content)
        return _FROM_CONTENT[kind](content)
    except (KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ProtocolError(f"a malformed value ({type(error).__name__}: {error})") from None


def _fields(value: Any) -> tuple[str, list[str]] | None:
    """Return the names of a named tuple's class and fields, or None for anything else."""
    fields = getattr(type(value), "_fields", None)
    if not isinstance(value, tuple) or not isinstance(fields, tuple) or len(fields) != len(value):
        return None
    try:
        _namedtuple(type(value).__name__, fields)
    except (TypeError, ValueError):  # it was made by hand, or with names that were replaced
        return None
    return type(value).__name__, list(fields)


@lru_cache(maxsize=64)
def _namedtuple(name: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    return namedtuple(name, fields)


_DICTS: dict[str, Callable[..., Any]] = {
    "dict": dict,
    "Counter": Counter,
    "OrderedDict": OrderedDict,
}
_PLAIN_OBJECTS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("decimal", "Decimal"): str,
    ("fractions", "Fraction"): str,
    ("datetime", "date"): lambda value: value.isoformat(),
    ("datetime", "time"): lambda value: value.isoformat(),
    ("datetime", "datetime"): lambda value: value.isoformat(),
    ("datetime", "timedelta"): lambda value: [value.days, value.seconds, value.microseconds],
    ("array", "array"): lambda value: [value.typecode, value.tolist()],
}
_FROM_ITEMS: dict[str, Callable[..., Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
_FROM_CONTENT: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda content: complex(*content),
    "range": lambda content: range(*content),
    "Decimal": lambda content: import_module("decimal").Decimal(content),
    "Fraction": lambda content: import_module("fractions").Fraction(content),
    "date": lambda content: import_module("datetime").date.fromisoformat(content),
    "time": lambda content: import_module("datetime").time.fromisoformat(content),
    "datetime": lambda content: import_module("datetime").datetime.fromisoformat(content),
    "timedelta": lambda content: import_module("datetime").timedelta(*content),
    "array": lambda content: import_module("array").array(*content),
}


def _read(fd: int, length: int) -> bytes:
    chunks = []
    while length:
        chunk = os.read(fd, min(length, 1 << 20))
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        length -= len(chunk)
    return b"".join(chunks)
