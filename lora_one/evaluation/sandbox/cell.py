"""What runs at the start of each sandboxed process: confine it, then be candidate or examiner.

``main`` reads one JSON object from standard input: ``role`` (``candidate`` or ``examiner``),
``task``, ``limits``, ``level``, ``paths``, ``user`` and ``process_limit``. Three descriptors come
as arguments: the status pipe to the supervisor, and the pipes from and to the other role. Lines of
JSON go to the status pipe: ``{"ready": true}`` or ``{"broken": ...}``, then the examiner's
``{"verdict": ...}``, then ``{"end": ...}``.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NoReturn

from lora_one.evaluation.sandbox import candidate, examiner, guard, kernel, namespaces
from lora_one.evaluation.sandbox.audit import refuse_the_outside


def main() -> NoReturn:
    """Run one role in its own sandbox; never returns."""
    status, incoming, outgoing = (int(argument) for argument in sys.argv[1:4])
    order = json.loads(sys.stdin.buffer.read())
    # Of all signals Python handles this one. Process 1 is deaf to what nobody handles.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    try:
        if order["level"] == "unshare":
            _start_in_namespaces(order, status, incoming, outgoing)
        else:
            kernel.die_with_parent()
            _guard(order, status, incoming, outgoing, order["user"])
    except OSError as error:
        _say(status, {"broken": str(error)})
    os._exit(1)


def _start_in_namespaces(
    order: dict[str, Any], status: int, incoming: int, outgoing: int
) -> NoReturn:
    user = namespaces.enter_namespaces()
    kernel.die_with_parent()
    first = os.fork()
    if first == 0:
        kernel.die_with_parent()
        try:
            _guard(order, status, incoming, outgoing, user)
        except OSError as error:
            _say(status, {"broken": str(error)})
        os._exit(1)

    def stop(*_: object) -> None:
        os.kill(first, signal.SIGKILL)

    signal.signal(signal.SIGTERM, stop)
    # Closed here, so that the other role sees the end of the pipe when its partner ends.
    os.close(incoming)
    os.close(outgoing)
    os.waitpid(first, 0)
    os._exit(0)


def _guard(
    order: dict[str, Any], status: int, incoming: int, outgoing: int, user: int | None
) -> NoReturn:
    """Build the sandbox, start the role in a child, watch it, and report its end."""
    limits = SimpleNamespace(**order["limits"])
    proc = None
    if order["level"] == "unshare":
        proc = namespaces.build_root(order["paths"], limits.work_bytes, user)
        namespaces.forbid_user_namespaces(proc)
    elif order["level"] == "bubblewrap":
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    else:
        kernel.adopt_orphans()
        signal.signal(signal.SIGTERM, _stop)
    kernel.hide_memory()
    read_output, write_output = os.pipe()
    child = os.fork()
    if child == 0:
        _close_all_but(status, incoming, outgoing, write_output)
        for standard in (1, 2):
            os.dup2(write_output, standard)
        os.close(write_output)
        _be(order, limits, status, incoming, outgoing, user)
    _say(status, {"ready": True})
    for fd in (incoming, outgoing, write_output):
        os.close(fd)
    end = guard.watch(child, read_output, limits, proc)
    # Before anything is closed: a program past a limit has no word in how it ended.
    if os.getpid() == 1:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    else:
        guard.kill_descendants()
    _say(status, {"end": end._asdict()})
    os._exit(0)


def _be(
    order: dict[str, Any],
    limits: SimpleNamespace,
    status: int,
    incoming: int,
    outgoing: int,
    user: int | None,
) -> NoReturn:
    """Give up all privileges and play the role."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        kernel.die_with_parent()
        os.chdir(order["work"])
        os.environ.clear()
        sys.argv, sys.path = [""], [entry for entry in sys.path if entry != order["package"]]
        namespaces_used = order["level"] != "rlimits"
        guard.confine(limits, user, order["process_limit"], namespaces=namespaces_used)
        kernel.die_with_parent()  # once more: the kernel forgets it where the user has changed
        if order["role"] == "candidate":
            os.close(status)
            if order["level"] == "rlimits":
                refuse_the_outside(order["paths"], order["work"])
            candidate.serve(order["task"]["program"], incoming, outgoing)
        else:
            _say(status, {"verdict": examiner.examine(order["task"], outgoing, incoming)})
        code = 0
    except SystemExit:
        code = 3
    finally:
        # No exit handlers and no flushing: nothing that a program left behind runs any more.
        os._exit(code)


def _close_all_but(*kept: int) -> None:
    previous = 2
    for fd in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        os.closerange(previous + 1, fd)
        previous = fd


def _stop(*_: object) -> NoReturn:
    guard.kill_descendants()
    os._exit(0)


def _say(status: int, message: dict[str, Any]) -> None:
    os.write(status, json.dumps(message).encode() + b"\n")
