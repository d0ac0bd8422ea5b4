"""Runs scripts, each as the main program of a process forked from this one: imports are paid once.

Reads a job per line of JSON: the command (script and arguments), the file for its output, and the
environment variables of each process that is to run it. Answers with the list of exit statuses.
It imports no ``lora_one`` and computes nothing.
"""

import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from contextlib import suppress

SECONDS = 120
LIBRARIES = (
    "torch",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "peft",
    "bitsandbytes",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
)


def main() -> None:
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        processes = []
        for variables in job["environments"]:
            processes.append(os.fork())
            if processes[-1] == 0:
                os.environ.update(variables)
                become(job["command"], job["output"])
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in processes]
        print(json.dumps(statuses), flush=True)
    os._exit(0)  # tidying up after these libraries takes seconds


def become(command: list[str], output: str) -> None:
    """Be ``python <command>``, and end."""
    signal.alarm(SECONDS)
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = command
    status = 1
    try:
        runpy.run_path(command[0], run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
