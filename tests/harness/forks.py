"""The command line in a process of its own within milliseconds: a parent imports, children fork.

Run as a script it is the parent. It reads one command per line of JSON, forks a child that does
what ``run_exp.py`` would, and writes ``[number, pid]`` when the child starts and
``[number, status]`` when it is over. It imports torch and computes nothing, so that there is no
thread to lose in a fork.
"""

import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Child:
    """One command, running or over."""

    def __init__(self, parent: "Forks", number: int, pid: int, output: Path) -> None:
        self.pid = pid
        self._parent, self._number, self._output = parent, number, output

    @property
    def said(self) -> str:
        """What it wrote to stdout and stderr so far."""
        return self._output.read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; a child that is over is left alone."""
        if self.running():
            with suppress(ProcessLookupError):  # it ended in between
                os.kill(self.pid, number)

    def running(self) -> bool:
        """Tell whether it has not ended yet."""
        self._parent.read(0)
        return self._number not in self._parent.statuses

    def wait(self, seconds: float = 60) -> int:
        """Return the exit status, negative after a signal."""
        end = time.monotonic() + seconds
        while self._number not in self._parent.statuses:
            assert time.monotonic() < end, f"still running:\n{self.said}"
            self._parent.read(1)
        return self._parent.statuses[self._number]

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Return as soon as it has said something."""
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end, f"never said {text!r}:\n{self.said}"
            assert self.running(), f"over before {text!r}:\n{self.said}"
            time.sleep(0.002)


class Forks:
    """The parent, seen from the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.statuses: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            bufsize=0,
        )
        self._rest = b""

    def start(self, *overrides: str, **environment: str) -> Child:
        """Start ``python run_exp.py <overrides>`` with more environment variables."""
        self._count += 1
        number, output = self._count, self.folder / f"output-{self._count}"
        output.touch()
        command = {"number": number, "overrides": overrides, "environment": environment}
        self._process.stdin.write((json.dumps(command | {"output": str(output)}) + "\n").encode())
        while number not in self._pids:
            self.read(60)
        return Child(self, number, self._pids[number], output)

    def read(self, seconds: float) -> None:
        """Take note of children that started or ended."""
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return
        data = os.read(self._process.stdout.fileno(), 65536)
        assert data, "the parent is gone"
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            kind, number, value = json.loads(line)
            (self._pids if kind == "pid" else self.statuses)[number] = value

    def close(self) -> None:
        """End the parent."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    import run_exp
    from lora_one.harness import stages  # noqa: F401 -- torch, transformers and peft

    gc.freeze()  # collections of the children leave the libraries alone
    children: dict[int, int] = {}
    pending = b""
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.005)
        if ready:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                command = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _run(run_exp, command)
                children[pid] = command["number"]
                _tell("pid", command["number"], pid)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            _tell("status", children.pop(pid), os.waitstatus_to_exitcode(status))


def _tell(kind: str, number: int, value: int) -> None:
    os.write(1, (json.dumps([kind, number, value]) + "\n").encode())


def _run(run_exp: object, command: dict) -> None:
    output = os.open(command["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(command["environment"])
    # A suite in the background is started deaf to Ctrl-C, and a run would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["run_exp.py", *command["overrides"]]
    status = 99
    try:
        status = run_exp.launch(run_exp.run, run_exp.CONF, str(ROOT / "run_exp.py"))
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
