"""Judge a program by its tests: two sandboxes, one verdict."""

import os
import select
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_one.evaluation.sandbox.launch import LEVELS, Cell, Level, SandboxError
from lora_one.evaluation.sandbox.limits import Limits
from lora_one.evaluation.sandbox.namespaces import NOBODY, WORK, readable_paths

REASONS = (
    "passed",
    "failed",
    "error",
    "blocked",
    "timeout",
    "memory",
    "output",
    "exited",
    "crashed",
)
_START_SECONDS = 60.0  # for both interpreters to start, on a machine that is busy
_LAST_WORDS = 0.2  # seconds for a judged program to end by itself, which it does at once
_DETAIL = 600  # letters of a detail
_GRACE = 2.0  # seconds between the end of one role and the word of the other


@dataclass(frozen=True)
class Outcome:
    """The verdict on one program.

    Attributes:
        reason: One of ``REASONS``. ``passed``: every test ran and held. ``failed``: one did not.
            ``error``: the program raised. ``blocked``: it raised because the sandbox refused
            something. ``timeout``, ``memory``, ``output``: that limit was passed. ``exited``,
            ``crashed``: its process ended before the tests did.
        detail: The failed test, the error, the signal, in one line.
        output: The last of what the program printed, where it ended by itself.
        seconds: Wall time of the program and its tests, without the start of the sandbox.
        isolation: The level under which it ran.
    """

    reason: str
    detail: str
    output: str
    seconds: float
    isolation: Level

    @property
    def passed(self) -> bool:
        """Whether every test ran and held."""
        return self.reason == "passed"


@dataclass(frozen=True)
class Isolation:
    """What this machine allows, found by trying.

    Attributes:
        level: ``unshare`` (namespaces of our own making), ``bubblewrap``, or ``rlimits``.
        refused: Why the stronger levels could not be had, by level.
    """

    level: Level
    refused: dict[str, str]

    @property
    def remark(self) -> str | None:
        """What to tell people before programs run; None where nothing stronger was refused."""
        if not self.refused:
            return None
        reasons = "; ".join(f"{level}: {why}" for level, why in self.refused.items())
        protection = "" if self.level != "rlimits" else ", which stops accidents but not attackers"
        return f"programs are isolated by '{self.level}'{protection} ({reasons})"


def judge_program(
    program: str,
    tests: str,
    *,
    prelude: str = "",
    names: Sequence[str] = (),
    limits: Limits | None = None,
    level: Level | None = None,
) -> Outcome:
    """Run a program and its tests, each in a sandbox of its own.

    Args:
        program: Untrusted Python source.
        tests: Trusted source; it passes when it runs to its end. Names that neither it, the
            prelude nor Python defines are the program's.
        prelude: Trusted source run before the tests, for helpers that they use.
        names: Names that the tests take from the program although the prelude or Python has them.
        limits: What the program may use; default ``Limits()``.
        level: Isolation; default the strongest that works here (``isolation()``).

    Raises:
        SandboxError: The sandbox could not be set up, or prelude or tests are no valid Python.
    """
    limits = limits or Limits()
    level = level or isolation().level
    task = {"prelude": prelude, "tests": tests, "names": list(names)}
    with ExitStack() as stack:
        work = WORK if level != "rlimits" else _working_folder(stack)
        pipes = [*os.pipe(), *os.pipe()]
        requests_out, requests_in, replies_out, replies_in = pipes
        try:
            candidate = stack.enter_context(
                Cell(
                    "candidate",
                    {"program": program},
                    level=level,
                    limits=limits,
                    work=work,
                    incoming=requests_out,
                    outgoing=replies_in,
                )
            )
            examiner = stack.enter_context(
                Cell(
                    "examiner",
                    {**task, "reply_bytes": limits.reply_bytes},
                    level=level,
                    # Waiting costs no processor time; what it reads was bounded before.
                    limits=replace(limits, memory_bytes=max(limits.memory_bytes, 1 << 30)),
                    work=WORK if level != "rlimits" else "/",
                    incoming=replies_out,
                    outgoing=requests_in,
                )
            )
        finally:
            for fd in pipes:
                os.close(fd)
        reason, detail, output, seconds = _Trial(candidate, examiner).decide(limits)
    # What a program says is for files and terminals: no lone surrogates, no control characters.
    detail = _printable(" ".join(detail[:_DETAIL].split()))
    return Outcome(reason, detail, _printable(output, keep="\n\t"), seconds, level)


@lru_cache(maxsize=1)
def isolation() -> Isolation:
    """Find the strongest isolation that works here, by running a program that tests it.

    Raises:
        SandboxError: Not even the weakest works.
    """
    refused: dict[str, str] = {}
    for level in LEVELS:
        try:
            outcome = _probe(level)
        except SandboxError as error:
            refused[level] = str(error)
            continue
        if outcome.passed:
            return Isolation(level, refused)
        refused[level] = f"{outcome.reason}: {outcome.detail}"
    reasons = "; ".join(f"{level}: {why}" for level, why in refused.items())
    raise SandboxError(f"no sandbox works on this machine ({reasons})")


_PROBE = """
import os, socket, time

def listing(folder):
    try:
        return os.listdir(folder)
    except OSError:
        return []

def exists(path):
    return os.path.exists(path)

def writable(folder):
    return os.access(folder, os.W_OK)

def interfaces():
    return [name for _, name in socket.if_nameindex()]

def forks(wanted):
    count = 0
    for _ in range(wanted):
        try:
            child = os.fork()
        except OSError:
            return count
        if child == 0:
            time.sleep(60)
        count += 1
    return count
"""
_PROBE_ISOLATED = """
assert not exists(OUTSIDE), "files of the machine can be read"
assert not writable("/"), "the file system can be written"
assert interfaces() in ([], ["lo"]), "there is a network"
"""
_PROBE_HOME = """
assert set(listing(HOME)) <= SHOWN, "the home folder can be read"
assert not writable(HOME), "the home folder can be written"
"""


def _probe(level: Level) -> Outcome:
    """Ask a program inside what it can see and do."""
    limits = Limits(processes=6)
    # Not resolve(): what counts is the name, which inside is no link.
    home = Path(os.path.abspath(Path.home()))  # noqa: PTH100
    shown = {
        Path(path).relative_to(home).parts[0]
        for path in readable_paths(os.environ.get("LD_LIBRARY_PATH", ""))
        if Path(path).is_relative_to(home) and Path(path) != home
    }
    tests = f"HOME, SHOWN = {str(home)!r}, {shown!r}\nassert writable('.')\n"
    # A thread of another process may end between counting and forking, hence some room.
    forks = f"assert forks({limits.processes + 50}) <= {limits.processes + 20}, 'no fork limit'\n"
    with tempfile.NamedTemporaryFile(prefix="sandbox-") as outside:
        if level != "rlimits":
            tests += f"OUTSIDE = {outside.name!r}\n{_PROBE_ISOLATED}"
            # A home at or above the sandbox's own folder, as in containers, is under that name
            # another, empty one: then the file outside, below the same name, is what tells.
            tests += "" if Path(WORK).is_relative_to(home) else _PROBE_HOME
        return judge_program(_PROBE, tests + forks, limits=limits, level=level)


def _working_folder(stack: ExitStack) -> str:
    above = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-")))
    folder = above / "0"
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        above.chmod(0o711)
        os.chown(folder, NOBODY, NOBODY)
    stack.callback(_remove_folders_in, above)
    return str(folder)


def _remove_folders_in(above: Path) -> None:
    """Remove what a program left, at any depth: ``shutil.rmtree`` calls itself for each level."""
    moved = 0
    while folders := list(above.iterdir()):
        for folder in folders:
            folder.chmod(0o700)
            for entry in list(folder.iterdir()):
                if entry.is_dir() and not entry.is_symlink():
                    entry.chmod(0o700)  # to move a folder one must be allowed to write to it
                    moved += 1
                    entry.rename(above / str(moved))
                else:
                    entry.unlink()
            folder.rmdir()


def _printable(text: str, keep: str = "") -> str:
    return "".join(c if c.isprintable() or c in keep else "\N{REPLACEMENT CHARACTER}" for c in text)


class _Trial:
    """What both sandboxes said so far, and what follows from it."""

    def __init__(self, candidate: Cell, examiner: Cell) -> None:
        self._cells = {"candidate": candidate, "examiner": examiner}
        self._said: dict[str, dict[str, Any]] = {"candidate": {}, "examiner": {}}
        self._silent: set[str] = set()

    def decide(self, limits: Limits) -> tuple[str, str, str, float]:
        """Return reason, detail, output and seconds."""
        if not self._listen(time.monotonic() + _START_SECONDS, self._both_ready):
            raise SandboxError(f"the sandbox was not ready within {_START_SECONDS:.0f} s")
        start = time.monotonic()
        decided = self._listen(start + limits.wall_seconds, self._one_decided)
        # Whoever speaks first, the other may have the reason; and the end brings the output.
        self._listen(time.monotonic() + _GRACE, self._explained)
        self._listen(time.monotonic() + _LAST_WORDS, self._candidate_ended)
        seconds = time.monotonic() - start
        verdict = self._said["examiner"].get("verdict")
        end = self._said["candidate"].get("end", {})
        output = end.get("output", "")
        if verdict is not None and verdict["reason"] == "broken":
            raise SandboxError(f"the tests cannot be run: {verdict['detail']}")
        if verdict is not None and verdict["reason"] != "gone":
            return verdict["reason"], verdict["detail"], output, seconds
        if not decided:
            return "timeout", f"no verdict after {limits.wall_seconds:g} s", output, seconds
        if verdict is None and "end" in self._said["examiner"]:
            # The tests themselves passed a limit, on what the program gave them.
            return *_reason_of(self._said["examiner"]["end"]), output, seconds
        return *_reason_of(end), output, seconds

    def _both_ready(self) -> bool:
        return all("ready" in said for said in self._said.values())

    def _one_decided(self) -> bool:
        return "verdict" in self._said["examiner"] or any("end" in s for s in self._said.values())

    def _explained(self) -> bool:
        """Whether nothing that is still to come could change the verdict."""
        if not self._one_decided():
            return True
        verdict = self._said["examiner"].get("verdict")
        if verdict is not None and verdict["reason"] != "gone":
            return True
        return "end" in self._said["candidate"] and "end" in self._said["examiner"]

    def _candidate_ended(self) -> bool:
        return "end" in self._said["candidate"]

    def _listen(self, deadline: float, enough: Any) -> bool:
        while not enough():
            speaking = {c.status: r for r, c in self._cells.items() if r not in self._silent}
            left = deadline - time.monotonic()
            if left <= 0 or not speaking:
                return False
            ready, _, _ = select.select(list(speaking), [], [], left)
            for fd in ready:
                self._hear(speaking[fd])
        return True

    def _hear(self, role: str) -> None:
        cell, said = self._cells[role], self._said[role]
        messages = cell.read()
        if messages is None:
            self._silent.add(role)
            if "ready" not in said:
                raise SandboxError(f"the sandbox did not start: {cell.last_words()}")
            said.setdefault("end", {"kind": "signal", "code": int(signal.SIGKILL), "output": ""})
            return
        for message in messages:
            said.update(message)
        if "broken" in said:
            raise SandboxError(str(said["broken"]))


def _reason_of(end: dict[str, Any]) -> tuple[str, str]:
    """Turn the end of a process into a reason and a detail."""
    kind, code = end.get("kind"), end.get("code", 0)
    if kind in ("timeout", "memory", "output"):
        return kind, f"the limit on {'processor time' if kind == 'timeout' else kind} was passed"
    if kind == "exit":
        return "exited", f"the process ended with status {code} before the tests did"
    try:
        name = signal.Signals(code).name
    except ValueError:
        name = f"signal {code}"
    return "crashed", f"the process was ended by {name}"
