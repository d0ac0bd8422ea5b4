"""The first process of a sandbox: starts the program, watches it, and says how it ended.

Inside a PID namespace the guard is process 1. Its end is the end of every other process there,
whatever session or group they moved to, and no signal from inside can end it: it handles none.
"""

import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_one.evaluation.sandbox import kernel, syscalls

if TYPE_CHECKING:
    from lora_one.evaluation.sandbox.limits import Limits

_INTERVAL = 0.02  # seconds between looks at the processes
_TAIL = 2000  # bytes of output that are kept
_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


class End(NamedTuple):
    """How a program ended.

    Attributes:
        kind: ``exit``, ``signal``, or the limit that was passed: ``timeout``, ``memory``,
            ``output``.
        code: The exit status or the number of the signal.
        output: The last of what it printed.
    """

    kind: str
    code: int
    output: str


def confine(limits: "Limits", user: int | None, processes: int, *, namespaces: bool) -> None:
    """Apply the limits to this process and give up every privilege; there is no way back.

    Args:
        limits: The limits.
        user: The unprivileged user and group to become; None stays.
        processes: The limit on processes, what the user runs outside included where it counts.
        namespaces: The process is in namespaces of its own.
    """
    for name, value in (
        ("RLIMIT_CPU", max(1, round(limits.cpu_seconds))),
        ("RLIMIT_AS", limits.memory_bytes),
        ("RLIMIT_FSIZE", limits.file_bytes),
        ("RLIMIT_NOFILE", 64),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
        ("RLIMIT_MSGQUEUE", 0),
        ("RLIMIT_NPROC", processes),
    ):
        _lower(name, value)
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    kernel.drop_privileges()
    syscalls.refuse_calls(namespaces=namespaces)


def watch(child: int, output: int, limits: "Limits", proc: int | None) -> End:
    """Wait for ``child`` and enforce the limits that the kernel enforces only per process.

    Args:
        child: Process to wait for.
        output: Reading end of the pipe that it prints to.
        limits: The limits.
        proc: Descriptor of the ``/proc`` whose processes all belong to the program, but for this
            one; None: only ``child`` itself is seen, through its limits.
    """
    tail, printed, next_look = b"", 0, 0.0
    open_output = True
    while True:
        ready, _, _ = select.select([output] if open_output else [], [], [], _INTERVAL)
        if ready:
            chunk = os.read(output, 1 << 16)
            open_output = bool(chunk)
            printed += len(chunk)
            tail = (tail + chunk)[-_TAIL:]
        text = tail.decode(errors="replace")
        if printed > limits.output_bytes:
            return End("output", 0, text)
        ended = _reap(child)
        if ended is not None:
            return _describe(ended, text)
        if proc is not None and time.monotonic() >= next_look:
            next_look = time.monotonic() + _INTERVAL
            passed = _passed_limit(proc, limits)
            if passed is not None:
                return End(passed, 0, text)


def kill_descendants() -> None:
    """Kill what descends from this process, until nothing is left (no PID namespace does it)."""
    me = os.getpid()
    for _ in range(1000):
        parents = dict(_parents())
        victims = [pid for pid in parents if pid != me and _descends(pid, me, parents)]
        if not victims:
            return
        for pid in victims:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.002)


def _reap(child: int) -> int | None:
    """Collect ended processes, adopted ones too; return the wait status of ``child``."""
    found = None
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                found = status
    return found


def _describe(status: int, text: str) -> End:
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        # SIGKILL: the hard limit on processor time, or the kernel's own memory killer.
        return End("timeout" if code == -signal.SIGXCPU else "signal", -code, text)
    return End("exit" if code >= 0 else "signal", abs(code), text)


def _passed_limit(proc: int, limits: "Limits") -> str | None:
    memory, cpu = 0, 0.0
    for name in os.listdir(proc):
        if not name.isdigit() or name == "1":
            continue
        fields = _stat_fields(f"{name}/stat", proc)
        if fields is not None:
            # After the name in brackets: utime and stime, of the process and of the children that
            # it has waited for, and the resident pages.
            cpu += sum(map(int, fields[11:15])) / _TICKS
            memory += int(fields[21]) * _PAGE
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu += children.ru_utime + children.ru_stime
    if memory > limits.memory_bytes:
        return "memory"
    return "timeout" if cpu > limits.cpu_seconds else None


def _parents() -> Iterator[tuple[int, int]]:
    with os.scandir("/proc") as entries:
        numbers = [int(entry.name) for entry in entries if entry.name.isdigit()]
    for number in numbers:
        fields = _stat_fields(f"/proc/{number}/stat")
        if fields is not None and fields[0] != "Z":
            yield number, int(fields[1])


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents:
        pid = parents[pid]
        if pid == ancestor:
            return True
    return False


def _stat_fields(path: str, dir_fd: int | None = None) -> list[str] | None:
    """Return the fields of a stat file from the state on; None when the process is gone."""
    opener: Callable[[str, int], int] = lambda name, flags: os.open(name, flags, dir_fd=dir_fd)  # noqa: E731
    try:
        # The name in brackets may be any bytes: the kernel cuts it, also within a character.
        with open(path, opener=opener, encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _lower(name: str, value: int) -> None:
    kind: Any = getattr(resource, name, None)
    if kind is None:
        return
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    # The soft limit on processor time sends SIGXCPU, which tells it from other ends.
    spare = 1 if name == "RLIMIT_CPU" and (hard == resource.RLIM_INFINITY or hard > value) else 0
    resource.setrlimit(kind, (value, value + spare))
