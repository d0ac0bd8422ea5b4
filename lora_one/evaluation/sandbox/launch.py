"""Start and end one sandboxed process from outside, and hear from it."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lora_one.evaluation.sandbox.limits import Limits
from lora_one.evaluation.sandbox.namespaces import DEVICES, NOBODY, WORK, readable_paths

Level = Literal["unshare", "bubblewrap", "rlimits"]
LEVELS: tuple[Level, ...] = ("unshare", "bubblewrap", "rlimits")

_PACKAGE = Path(__file__).resolve().parents[3]
_BOOT = (
    "import sys; sys.path[0] = sys.argv.pop(); "
    "from lora_one.evaluation.sandbox.cell import main; main()"
)
_SHOWN_PACKAGE = "/sandbox-code"  # where bubblewrap shows this package
_OWN_PROCESSES = 3  # guard, its parent and bubblewrap's monitor count as the user's processes
_PATIENCE = 5.0  # seconds for a process to follow SIGTERM


class SandboxError(RuntimeError):
    """The sandbox itself failed, so that nothing can be said about the program."""


class Cell:
    """A sandboxed process, seen from outside; a context manager that ends it for certain."""

    def __init__(
        self,
        role: Literal["candidate", "examiner"],
        task: dict[str, Any],
        *,
        level: Level,
        limits: Limits,
        work: str,
        incoming: int,
        outgoing: int,
    ) -> None:
        paths = readable_paths(os.environ.get("LD_LIBRARY_PATH", ""))
        user = NOBODY if level == "rlimits" and os.geteuid() == 0 else None
        package = _SHOWN_PACKAGE if level == "bubblewrap" else str(_PACKAGE)
        order = {
            "role": role,
            "task": task,
            "level": level,
            "limits": asdict(limits),
            "paths": paths,
            "package": package,
            "work": work,
            "user": user,
            "process_limit": _process_limit(level, limits, user),
        }
        launcher = _bubblewrap(paths, limits) if level == "bubblewrap" else []
        python = [_interpreter(user is not None), "-u", "-s", "-S", "-B", "-c", _BOOT]
        self.status, status = os.pipe()
        self._buffer = b""
        fds = (status, incoming, outgoing)
        command = [*launcher, *python, *(str(fd) for fd in fds), package]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=fds,
                env=_environment(),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            os.close(self.status)
            raise SandboxError(f"cannot start {command[0]}: {error}") from error
        finally:
            os.close(status)
        try:
            with self._process.stdin as stdin:
                stdin.write(json.dumps(order).encode())
        except BrokenPipeError:
            pass  # it ended before it read: what it said is reported by ``read``

    def __enter__(self) -> "Cell":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stderr.close()
        os.close(self.status)

    def read(self) -> list[dict[str, Any]] | None:
        """Return the messages that have arrived on ``status``; None at its end."""
        chunk = os.read(self.status, 1 << 16)
        if not chunk:
            return None
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def last_words(self) -> str:
        """Return what a process said on standard error before its sandbox was ready."""
        os.set_blocking(self._process.stderr.fileno(), False)
        text = (self._process.stderr.read() or b"").decode(errors="replace").strip()
        return text.splitlines()[-1] if text else "it ended without a word"


def _interpreter(others: bool) -> str:
    """Return the Python without its virtual environment, one that ``others`` may use if so."""
    own = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    if not others:
        return own
    for candidate in (own, "/usr/local/bin/python3", "/usr/bin/python3"):
        folders = [Path(candidate), *Path(os.path.realpath(candidate)).parents]
        if all(folder.exists() and folder.stat().st_mode & 0o001 for folder in folders):
            return candidate
    raise SandboxError(
        "started by root without namespaces, programs must run as an unprivileged user, and "
        f"{own} lies where only root may read; run as a plain user or install a system Python"
    )


def _environment() -> dict[str, str]:
    """Return what the interpreter needs to start; the program sees an empty environment."""
    kept = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
    return {"PYTHONHASHSEED": "0", **kept}  # the same order of sets in every evaluation


def _process_limit(level: Level, limits: Limits, user: int | None) -> int:
    """Return RLIMIT_NPROC, which since Linux 5.14 counts per user namespace, before per machine."""
    release = platform.release().split("-")[0].split(".")
    recent = tuple(int(part) for part in release[:2] if part.isdigit()) >= (5, 14)
    if level != "rlimits" and recent:
        return limits.processes + _OWN_PROCESSES
    counted = os.geteuid() if user is None and os.geteuid() != 0 else NOBODY
    return limits.processes + _OWN_PROCESSES + _threads_of(counted)


def _threads_of(user: int) -> int:
    count = 0
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if entry.stat().st_uid == user:
                count += sum(1 for _ in (entry / "task").iterdir())
        except OSError:  # it has ended
            continue
    return count


def _bubblewrap(paths: Sequence[str], limits: Limits) -> list[str]:
    if os.geteuid() == 0:
        raise SandboxError("bubblewrap is not used by root, whom the process limit does not bind")
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bubblewrap (bwrap) is not installed")
    arguments = [program, "--unshare-all", "--unshare-user", "--disable-userns"]
    arguments += ["--cap-drop", "ALL", "--hostname", "sandbox"]
    arguments += ["--die-with-parent", "--new-session", "--as-pid-1"]
    # First: a Python that lies below the machine's /tmp is shown on top of it.
    arguments += ["--size", str(limits.work_bytes), "--tmpfs", WORK]
    for path in map(Path, paths):
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        else:
            arguments += ["--ro-bind", str(path), str(path)]
    for device in DEVICES:
        arguments += ["--dev-bind", device, device]
    arguments += ["--ro-bind", str(_PACKAGE / "lora_one"), f"{_SHOWN_PACKAGE}/lora_one"]
    return [*arguments, "--proc", "/proc", "--remount-ro", "/", "--chdir", "/", "--"]
