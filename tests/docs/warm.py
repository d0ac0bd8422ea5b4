"""``python ...`` commands in some other folder, each in a fork of a process that has the libraries.

Run as a script it is that process: it imports torch, transformers and peft, but nothing of this
repository, so that a command finds the code of the folder it is run in. It reads one command per
line of JSON and answers with one line.
"""

import json
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


class Warm:
    """The process, seen from a test."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def run(self, command: str) -> tuple[int, str]:
        """Return the exit status of a command and what it said."""
        arguments = shlex.split(command)
        assert arguments.pop(0) == "python", command
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        return tuple(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    import peft  # noqa: F401 -- imported once for all commands
    import torch  # noqa: F401
    import transformers.trainer  # noqa: F401

    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output:
            pid = os.fork()
            if pid == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                _do(json.loads(line))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            output.seek(0)
            os.write(1, (json.dumps([status, output.read()]) + "\n").encode())


def _do(arguments: list[str]) -> None:
    """Do what ``python`` does with these arguments, and end."""
    status = 1
    try:
        sys.path[0] = str(Path.cwd())
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})  # noqa: S102 -- a block of our own pages
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
