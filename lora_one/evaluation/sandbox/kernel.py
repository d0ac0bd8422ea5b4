"""The Linux system calls that the standard library does not wrap, through ctypes."""

import ctypes
import os
import sys
from typing import Any

NEW_NAMESPACES = (
    0x00020000  # CLONE_NEWNS: mounts
    | 0x04000000  # CLONE_NEWUTS: host name
    | 0x08000000  # CLONE_NEWIPC: System V shared memory, message queues
    | 0x10000000  # CLONE_NEWUSER: user ids and capabilities
    | 0x20000000  # CLONE_NEWPID: process ids, from the next child on
    | 0x40000000  # CLONE_NEWNET: network devices, abstract sockets
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE = 1024, 2048, 4096, 16384, 1 << 18
MNT_DETACH = 2

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522

_LIBC = ctypes.CDLL(None, use_errno=True)


def unshare(flags: int) -> None:
    """Leave the given namespaces for new ones; the calling process must have one thread."""
    _check(_LIBC.unshare(flags), "unshare")


def mount(source: str, target: str, filesystem: str | None, flags: int, options: str = "") -> None:
    """Attach a file system, bind a folder to another name, or change what is mounted."""
    kind = None if filesystem is None else filesystem.encode()
    arguments = source.encode(), target.encode(), kind, ctypes.c_ulong(flags), options.encode()
    _check(_LIBC.mount(*arguments), f"mount {filesystem or source} on {target}")


def unmount(target: str) -> None:
    """Detach a mount and everything below it."""
    _check(_LIBC.umount2(target.encode(), MNT_DETACH), f"unmount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """Put ``new_root`` in the place of the root, and the old root at ``put_old``."""
    _check(_LIBC.pivot_root(new_root.encode(), put_old.encode()), "pivot_root")


def die_with_parent() -> None:
    """Have this process killed when the thread that started it ends."""
    if sys.platform == "linux":
        set_process_option(_PR_SET_PDEATHSIG, 9, what="set the parent-death signal")


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    if sys.platform == "linux":
        set_process_option(_PR_SET_CHILD_SUBREAPER, 1, what="adopt orphans")


def hide_memory() -> None:
    """Forbid processes of the same user to trace this one or to read its memory."""
    if sys.platform == "linux":
        set_process_option(_PR_SET_DUMPABLE, 0, what="hide the memory")


def drop_privileges() -> None:
    """Give up every capability for good, also for programs that are executed later."""
    if sys.platform != "linux":
        return
    set_process_option(_PR_SET_NO_NEW_PRIVS, 1, what="forbid new privileges")
    _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    for capability in range(64):
        # Fails without CAP_SETPCAP, where there is nothing to drop, and above the last capability.
        _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    _check(_LIBC.capset(header, (ctypes.c_uint32 * 6)()), "drop capabilities")


def set_process_option(option: int, *values: Any, what: str) -> None:
    """Call prctl(2); ``what`` names it in an error."""
    _check(_LIBC.prctl(option, *values, *[0] * (4 - len(values))), what)


def _check(result: int, what: str) -> None:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
