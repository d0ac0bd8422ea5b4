"""The trusted side: run the tests on the candidate, in another process, and give the verdict."""

import ast
import builtins
import importlib
import sys
from typing import Any

from lora_one.evaluation.sandbox import wire

# Python itself takes these for the regular end of an iteration, in map, zip and for: raised within
# the tests, they would end the testing and not fail it.
_CONTROL_FLOW = (StopIteration, StopAsyncIteration)
_TEXT = 500  # letters that are kept of what the candidate says


class CandidateError(Exception):
    """The program raised something that the tests cannot raise in its place."""


class Remote:
    """An object of the candidate's process: called, read and written there, compared here.

    Two are equal when they are the same object. The candidate has no say in comparisons: an
    ``__eq__`` that always agrees is of no use to it.
    """

    def __init__(self, candidate: "Candidate", reference: int) -> None:
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_reference", reference)

    def __call__(self, *values: Any, **named: Any) -> Any:
        """Call it there; arguments and result go by value."""
        return self._candidate.ask("call", self, values, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._candidate.ask("getattr", self, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._candidate.ask("setattr", self, (name, value))

    def __getitem__(self, key: Any) -> Any:
        return self._candidate.ask("getitem", self, (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._candidate.ask("setitem", self, (key, value))

    def __len__(self) -> int:
        return int(self._candidate.ask("len", self))

    def __bool__(self) -> bool:
        return True

    def __next__(self) -> Any:
        for value in self._candidate.ask("next", self):
            return value
        # Not StopIteration, for the reason at _CONTROL_FLOW.
        raise CandidateError("StopIteration: an iterator of the program has no further value")

    def __iter__(self) -> Any:
        return iter(list(self._candidate.ask("iterate", self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._reference == self._reference

    def __hash__(self) -> int:
        return hash(self._reference)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Remote":
        return self


class Candidate:
    """The connection to the candidate's process."""

    def __init__(self, requests: int, replies: int, reply_bytes: int) -> None:
        self._requests = requests
        self._replies = replies
        self._reply_bytes = reply_bytes
        self._remotes: dict[int, Remote] = {}
        self.raised: Exception | None = None
        self.blocked = False

    def named(self, name: str) -> Any:
        """Return what the program calls ``name``."""
        return self._exchange({"do": "name", "name": name})

    def ask(
        self,
        what: str,
        target: Remote,
        values: tuple[Any, ...] = (),
        named: dict[str, Any] | None = None,
    ) -> Any:
        """Have something done to an object of the candidate's; arguments go by value."""
        return self._exchange(
            {
                "do": what,
                "reference": target._reference,
                "values": [wire.encode(value, self._refer) for value in values],
                "named": {k: wire.encode(v, self._refer) for k, v in (named or {}).items()},
            }
        )

    def wait_until_loaded(self) -> None:
        """Raise what the program raised when it was run."""
        self._result(wire.receive(self._replies, self._reply_bytes))

    def _exchange(self, request: dict[str, Any]) -> Any:
        try:
            wire.send(self._requests, request)
        except BrokenPipeError:
            raise EOFError from None
        return self._result(wire.receive(self._replies, self._reply_bytes))

    def _result(self, reply: Any) -> Any:
        if not isinstance(reply, dict):
            raise wire.ProtocolError("a reply that is no object")
        if "raised" in reply:
            raised = reply["raised"] if isinstance(reply["raised"], dict) else {}
            kind, text = (str(raised.get(key))[:_TEXT] for key in ("type", "text"))
            self.raised = _exception(kind, text)
            self.blocked = raised.get("blocked") is True
            raise self.raised
        return wire.decode(reply.get("value"), self._resolve)

    def _refer(self, value: Any) -> int:
        if not isinstance(value, Remote):
            raise TypeError(f"a test cannot pass {type(value).__name__} to the program")
        return value._reference

    def _resolve(self, number: int) -> Remote:
        return self._remotes.setdefault(number, Remote(self, number))


def examine(task: dict[str, Any], requests: int, replies: int) -> dict[str, str]:
    """Run the tests and return ``reason`` and ``detail``.

    Args:
        task: ``prelude`` (trusted definitions that the tests may use), ``tests``,
            ``names`` (what the tests take from the program, whatever else has that name) and
            ``reply_bytes``.
        requests: Writing end of the pipe to the candidate.
        replies: Reading end of the pipe from the candidate.

    Returns:
        ``reason``: ``passed``, ``failed``, ``error`` (the program raised), ``blocked`` (it raised
        because the sandbox refused something), ``memory``, ``gone`` (it ended), ``broken`` (the
        prelude or the tests are no valid Python).
    """
    candidate = Candidate(requests, replies, task["reply_bytes"])
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        code = compile(task["tests"], "<tests>", "exec")
        exec(compile(task["prelude"], "<prelude>", "exec"), namespace)  # noqa: S102 -- trusted
    except Exception as error:
        return {"reason": "broken", "detail": f"{type(error).__name__}: {error}"}
    try:
        candidate.wait_until_loaded()
        for name in [*task["names"], *_open_names(task["tests"], namespace)]:
            namespace[name] = candidate.named(name)
        exec(code, namespace)  # noqa: S102 -- trusted
    except Exception as error:
        # The program may raise one as well: input() does.
        if isinstance(error, EOFError) and error is not candidate.raised:
            return {"reason": "gone", "detail": ""}
        return _failure(error, candidate, task["tests"])
    return {"reason": "passed", "detail": ""}


def _open_names(tests: str, namespace: dict[str, Any]) -> list[str]:
    """Return the names that only the program can define; import those of standard modules."""
    stored, used = set(), set()
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else stored).add(node.id)
        elif isinstance(node, ast.arg):
            stored.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            stored.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            stored.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            stored.add(node.name)
    open_names = used - stored - namespace.keys() - vars(builtins).keys()
    for name in sorted(open_names & sys.stdlib_module_names):
        namespace[name] = importlib.import_module(name)
    return sorted(open_names - namespace.keys())


def _failure(error: Exception, candidate: Candidate, tests: str) -> dict[str, str]:
    detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if error is candidate.raised:
        reason = "memory" if isinstance(error, MemoryError) else "error"
        return {"reason": "blocked" if candidate.blocked else reason, "detail": detail[:_TEXT]}
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    if line is not None:
        detail += f"; line {line} of the tests: {tests.splitlines()[line - 1].strip()}"
    return {"reason": "failed", "detail": detail[:_TEXT]}


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, Exception)
        and not issubclass(kind, _CONTROL_FLOW)
    ):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and its like want more than a text
            pass
    return CandidateError(f"{name}: {text}")
