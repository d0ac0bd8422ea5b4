"""Run programs that a model wrote, and judge them by tests that they cannot touch.

**What is defended.** The machine (files, network, other processes, memory, time) and the verdict.
The program is assumed hostile; the benchmark's prelude and tests are trusted, but run in a sandbox
all the same.

**The verdict.** Program and tests run in *two* processes, each in a sandbox of its own: the
candidate, which holds the program, and the examiner, which holds the tests and the expected values.
Calls travel from examiner to candidate and results back, as JSON of plain values over two pipes.
Comparisons, counting and the verdict happen in the examiner; only it holds the pipe to the
supervisor outside. Whatever the program does to its own interpreter (printing, ``os._exit``,
replacing ``sys.stdout`` or builtins, patching modules, walking frames and the heap, closing or
writing to descriptors, an ``__eq__`` that always agrees), the worst is a wrong reply or none.

**Isolation levels**, found by trying (``isolation()``), named in every verdict:

* ``unshare``: new user, mount, PID, network, IPC and UTS namespaces. The root holds the Python
  installation and the system's libraries, read-only, three devices, and an empty ``/tmp`` of
  limited size as the only place to write; no home, no /proc, no /sys, no network. No capabilities,
  no new privileges, no further user namespaces, and no system calls that only an attacker needs
  (``syscalls``). The end of the guard, process 1, ends everything.
* ``bubblewrap``: the same through ``bwrap``, where only that program may create namespaces; its
  ``/proc`` of the sandbox's own processes is visible. Not used by root, whom the process limit
  would not bind.
* ``rlimits``: no namespace could be had. Limits hold, a fresh temporary folder is the working
  folder, the system call filter refuses signals to others, sockets and the execution of programs,
  an audit hook refuses what Python code does to files elsewhere, and started by root the program
  runs as nobody. This stops accidents, **not attackers**: native code may read and write the files
  that the user may.

**What remains.** The kernel is shared: a hole in it is a hole here. A program can pass tests
without solving the task if it knows the expected values, say by heart, or guesses ``True``.
Programs have the standard library only. The system call filter knows x86-64 and AArch64; elsewhere
memory in System V segments, anonymous files and shared mappings is bounded by time alone. Without a
PID namespace memory and processor time are bounded per process, not in total.

**What right programs may fail.** Arguments and results go by value: plain data, named tuples,
numbers, dates and arrays of the standard library (``wire``). A test that looks for changes in its
own arguments, or for identity, does not see them. Other objects of the program stay there; the
tests can call them, read and write their attributes and items, and iterate over them, and nothing
else. Tests fail that compare such objects (``__eq__``, ``<``), calculate with them, enter them by
``with``, name the program's classes in ``except`` or ``isinstance``, expect views of a dict, catch
the end of an iterator, or pass functions of their own. No test of HumanEval needs any of this.

Standard library only; Linux for the first two levels.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_one.evaluation.sandbox.judge import (
        REASONS,
        Isolation,
        Outcome,
        isolation,
        judge_program,
    )
    from lora_one.evaluation.sandbox.launch import LEVELS, SandboxError
    from lora_one.evaluation.sandbox.limits import Limits

_HOME = {
    "LEVELS": "launch",
    "REASONS": "judge",
    "Isolation": "judge",
    "Limits": "limits",
    "Outcome": "judge",
    "SandboxError": "launch",
    "isolation": "judge",
    "judge_program": "judge",
}

__all__ = [
    "LEVELS",
    "REASONS",
    "Isolation",
    "Limits",
    "Outcome",
    "SandboxError",
    "isolation",
    "judge_program",
]


def __getattr__(name: str) -> object:
    """Import the module that defines ``name`` on first use: a sandboxed process needs few."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
