"""The untrusted side: run the program, then do what the examiner asks with what it defined."""

import errno
import sys
import types
from typing import Any

from lora_one.evaluation.sandbox import wire

_REQUEST_BYTES = 1 << 30  # the examiner is trusted
_BLOCKED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENETUNREACH, errno.ENETDOWN)


def serve(program: str, requests: int, replies: int) -> None:
    """Run ``program`` and answer requests until the examiner closes its pipe.

    Whatever the program does to this interpreter it does to itself: the tests, the expected
    values and the verdict are in another process.
    """
    module = types.ModuleType("candidate")  # not __main__: what a script would run stays out
    sys.modules["candidate"] = module
    objects: list[Any] = []

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def resolve(number: int) -> Any:
        return objects[number]

    try:
        exec(compile(program, "<program>", "exec"), module.__dict__)  # noqa: S102 -- its purpose
    except Exception as error:
        wire.send(replies, {"raised": _describe(error)})
        return
    wire.send(replies, {"loaded": True})
    while True:
        try:
            request = wire.receive(requests, _REQUEST_BYTES)
        except EOFError:
            return
        try:
            reply = {"value": wire.encode(_perform(request, module, resolve), refer)}
        except Exception as error:
            reply = {"raised": _describe(error)}
        wire.send(replies, reply)


def _perform(request: dict[str, Any], module: types.ModuleType, resolve: Any) -> Any:
    kind = request["do"]
    if kind == "name":
        if request["name"] not in module.__dict__:
            raise NameError(f"name '{request['name']}' is not defined")
        return module.__dict__[request["name"]]
    target = resolve(request["reference"])
    values = [wire.decode(value, resolve) for value in request["values"]]
    if kind == "call":
        named = {key: wire.decode(value, resolve) for key, value in request["named"].items()}
        return target(*values, **named)
    if kind == "iterate":
        return list(target)
    return _OPERATIONS[kind](target, *values)


def _next(target: Any) -> list[Any]:
    """Return the next value of an iterator in a list; an empty one at its end."""
    try:
        return [next(target)]
    except StopIteration:
        return []


_OPERATIONS = {
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda target, key: target[key],
    "setitem": lambda target, key, value: target.__setitem__(key, value),
    "len": len,
    "next": _next,
}


def _describe(error: Exception) -> dict[str, Any]:
    try:
        text = str(error)[:500]
    except Exception:
        text = ""
    return {
        "type": type(error).__name__,
        "text": text,
        "blocked": isinstance(error, OSError) and error.errno in _BLOCKED,
    }
