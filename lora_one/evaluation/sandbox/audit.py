"""Where no namespace can be had: refuse what Python code does to the outside, by an audit hook.

This stops programs that do harm by mistake, as most generated ones would. It does not stop an
attacker: code that reaches memory or system calls past the interpreter is not seen (PEP 578).
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

_DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    "ctypes.",
    "fcntl.",
    "os.exec",
    "os.kill",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "pty.",
    "resource.",
    "signal.pthread_kill",
    "socket.",
    "subprocess.",
    "syslog.",
)
# Events about paths that change something, and how many of their arguments are paths.
_CHANGING = {
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.removexattr": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.setxattr": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.utime": 1,
}
_LISTING = ("os.chdir", "os.listdir", "os.scandir", "os.walk", "glob.glob")


def refuse_the_outside(readable: Sequence[str], work: str) -> None:
    """Let Python read only ``readable``, write only below ``work``, and start or signal nothing."""
    work = os.path.realpath(work)
    allowed = tuple(os.path.realpath(path) for path in readable)

    def inside(path: Any, roots: Sequence[str]) -> bool:
        if isinstance(path, int):  # an open descriptor; what could be opened was checked before
            return True
        real = os.path.realpath(os.fsdecode(path or "."))
        return any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(1, f"the sandbox refuses {event}")
        if event == "open":
            path, _, flags = arguments
            roots = (work, *_DEVICES) if flags & _WRITING else (work, *_DEVICES, *allowed)
            paths = [path]
        elif event in _CHANGING:
            paths, roots = list(arguments[: _CHANGING[event]]), (work,)
        elif event in _LISTING:
            paths, roots = list(arguments[:1]), (work, *allowed)
        else:
            return
        if not all(inside(path, roots) for path in paths):
            raise PermissionError(13, f"the sandbox refuses {event}")

    sys.addaudithook(hook)
