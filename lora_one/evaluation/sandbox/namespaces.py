"""Build the small world that a sandboxed process sees: namespaces, a new root, no way back.

The new root holds the Python installation, the system's shared libraries and three harmless
devices, all read-only, and an empty, size-limited ``/tmp``. The order of the mounts follows
bubblewrap: a tmpfs becomes the root first, so that what it covered is reached below ``/old``.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from lora_one.evaluation.sandbox import kernel

WORK = "/tmp"  # noqa: S108 -- the sandbox's own, empty file system, not the machine's
NOBODY = 65534
# Not /dev/zero: mapped, it is memory that processes share and none of them is charged for.
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec")
_FILES = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
# Flags of a mount that a user namespace inherited must stay when it is mounted again.
_KEPT = (
    (os.ST_NOSUID, kernel.MS_NOSUID),
    (os.ST_NODEV, kernel.MS_NODEV),
    (os.ST_NOEXEC, kernel.MS_NOEXEC),
    (os.ST_NOATIME, kernel.MS_NOATIME),
    (os.ST_NODIRATIME, kernel.MS_NODIRATIME),
)


def readable_paths(library_path: str = "") -> list[str]:
    """Return what a Python program needs to read: the installation and the system's libraries.

    Args:
        library_path: LD_LIBRARY_PATH, under which a Python from environment modules may find its
            libraries. A home folder itself, or a folder above one, is left out.
    """
    home = Path.home()
    wanted = [*_LIBRARIES, *_FILES, sys.base_prefix, sys.base_exec_prefix]
    wanted += [
        entry
        for entry in library_path.split(":")
        if Path(entry).is_absolute() and not home.is_relative_to(os.path.realpath(entry))
    ]
    chosen: list[Path] = []
    for path in map(Path, sorted(set(wanted))):
        below = any(path.is_relative_to(other) for other in chosen)
        if path.exists() and (path.is_symlink() or not below):
            chosen.append(path)
    return [str(path) for path in chosen]


def enter_namespaces() -> int | None:
    """Move to new namespaces; the next child is the first process of the new PID namespace.

    Started by root, two users exist inside: root, for the set-up, and an unprivileged one, whose
    id is returned and to which the process limit applies (Linux exempts root from it). Started by
    anybody else, that user is the only one, and None is returned.

    Raises:
        OSError: The kernel, or its configuration, does not allow it.
    """
    user, group = os.geteuid(), os.getegid()
    spare = _spare_user() if user == 0 else None
    if spare is None:
        kernel.unshare(kernel.NEW_NAMESPACES)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
        return None
    # Two lines in a map may be written only from the outer namespace: by a child left behind.
    wait_fd, go_fd = os.pipe()
    subject, helper = os.getpid(), os.fork()
    if helper == 0:
        os.close(go_fd)
        status = 1
        with suppress(OSError):
            if os.read(wait_fd, 1):
                for name in ("uid_map", "gid_map"):
                    Path(f"/proc/{subject}/{name}").write_text(f"0 0 1\n{spare} {spare} 1")
                status = 0
        os._exit(status)
    try:
        kernel.unshare(kernel.NEW_NAMESPACES)
        os.write(go_fd, b".")
    finally:
        os.close(go_fd)
        os.close(wait_fd)
        _, status = os.waitpid(helper, 0)
    if status != 0:
        raise PermissionError("the user and group maps could not be written")
    return spare


def build_root(paths: list[str], work_bytes: int, unprivileged: int | None) -> int:
    """Replace the root of this mount namespace; run by the first process of the PID namespace.

    Args:
        paths: Shown read-only, under their own names (``readable_paths``).
        work_bytes: Size of the file system at ``/tmp``.
        unprivileged: The user to whom ``/tmp`` belongs; None: the only one there is.

    Returns:
        A descriptor of this PID namespace's ``/proc``, which has no name any more.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", WORK, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0755")
    for name in ("old", "new", "proc"):
        Path(WORK, name).mkdir()
    kernel.pivot_root(WORK, f"{WORK}/old")
    os.chdir("/")
    kernel.mount("tmpfs", "/new", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0755")
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    # Before the paths: a Python that lies below the machine's /tmp is shown on top of it.
    Path(f"/new{WORK}").mkdir()
    options = f"mode=0700,size={work_bytes},nr_inodes=4096"
    kernel.mount("tmpfs", f"/new{WORK}", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    if unprivileged is not None:
        os.chown(f"/new{WORK}", unprivileged, unprivileged)
    for path in paths:
        _show(path)
    for device in DEVICES:
        _bind(device)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    os.chdir("/new")
    kernel.pivot_root(".", ".")
    kernel.unmount(".")
    os.chdir("/")
    _remount_read_only("/", kernel.MS_NOSUID | kernel.MS_NODEV)
    return proc


def forbid_user_namespaces(proc: int) -> None:
    """Forbid new user namespaces below this one: a way to privileges over kernel interfaces."""
    fd = os.open("sys/user/max_user_namespaces", os.O_WRONLY, dir_fd=proc)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


def _spare_user() -> int | None:
    """Return an id besides root that this namespace maps, for users and groups, or None."""

    def mapped(kind: str) -> set[int]:
        lines = Path(f"/proc/self/{kind}_map").read_text().splitlines()
        ranges = [[int(field) for field in line.split()] for line in lines]
        return {min(start + length - 1, NOBODY) for start, _, length in ranges if start <= NOBODY}

    common = (mapped("uid") & mapped("gid")) - {0}
    return max(common, default=None)


def _show(path: str) -> None:
    source, target = Path(f"/old{path}"), Path(f"/new{path}")
    if source.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink() and not target.exists():
            target.symlink_to(source.readlink())
        return
    _bind(path)
    _remount_read_only(str(target), kernel.MS_NOSUID | kernel.MS_NODEV)
    for inner in _mounts_below(str(target)):
        _remount_read_only(inner, kernel.MS_NOSUID | kernel.MS_NODEV)


def _bind(path: str) -> None:
    source, target = Path(f"/old{path}"), Path(f"/new{path}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    kernel.mount(str(source), str(target), None, kernel.MS_BIND | kernel.MS_REC)


def _remount_read_only(target: str, extra: int) -> None:
    present = os.statvfs(target).f_flag
    kept = sum(flag for status, flag in _KEPT if present & status)
    flags = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kept | extra
    kernel.mount("none", target, None, flags)


def _mounts_below(folder: str) -> list[str]:
    # Field 5 of mountinfo is the mount point; blanks in it are written \\040.
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].replace("\\040", " ") for line in lines]
    return [point for point in points if point.startswith(folder + "/")]
