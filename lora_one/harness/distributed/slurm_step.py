"""The SLURM step that this process is a task of, read from the variables that ``srun`` sets.

``SLURM_NTASKS`` and ``SLURM_PROCID`` are also there in a batch script and in a shell of
``salloc``, which are one process each; the variables of a step are what tells tasks apart.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_one.errors import InputError

# The steps of batch scripts, of prologs and of interactive shells have ids above this one.
LAST_STEP = 0xFFFFFFF0
# Two lists: names with ranges in brackets (node[003-007,010],x1) and counts (2(x3),1).
HOSTS = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")
COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True)
class SlurmStep:
    """One task of a step with several tasks.

    Attributes:
        job: The job's id; the tasks of an array have different ones.
        step: The step's id.
        rank: This task, counted over all nodes.
        tasks: How many there are.
        local_rank: This task, counted on its node.
        local_tasks: How many there are on this node.
        hosts: The nodes, the first of which runs task 0.
    """

    job: int
    step: int
    rank: int
    tasks: int
    local_rank: int
    local_tasks: int
    hosts: tuple[str, ...]


def read_step(environment: Mapping[str, str]) -> SlurmStep | None:
    """Return the step; None for a process on its own, which has no others to wait for.

    Raises:
        InputError: the variables of the step contradict each other.
    """
    if "SLURM_STEP_ID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    step = _number(environment, "SLURM_STEP_ID")
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS")
    if tasks == 1 or step >= LAST_STEP:
        return None
    per_node = expand_counts(_text(environment, "SLURM_STEP_TASKS_PER_NODE"))
    hosts = expand_hosts(_text(environment, "SLURM_STEP_NODELIST"))
    node = _number(environment, "SLURM_NODEID")
    if _is_inherited(environment, hosts, per_node, node):
        return None
    rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    for holds, why in (
        (len(per_node) == len(hosts), "SLURM_STEP_TASKS_PER_NODE and SLURM_STEP_NODELIST"),
        (sum(per_node) == tasks, "SLURM_STEP_TASKS_PER_NODE and SLURM_STEP_NUM_TASKS"),
        (node < len(hosts), "SLURM_NODEID and SLURM_STEP_NODELIST"),
        (rank < tasks, "SLURM_PROCID and SLURM_STEP_NUM_TASKS"),
    ):
        _require(environment, holds, why)
    _require(
        environment, local_rank < per_node[node], "SLURM_LOCALID and SLURM_STEP_TASKS_PER_NODE"
    )
    job = _number(environment, "SLURM_JOB_ID")
    return SlurmStep(job, step, rank, tasks, local_rank, per_node[node], tuple(hosts))


def expand_hosts(text: str) -> list[str]:
    """``node[003-004,010],x1`` -> node003, node004, node010, x1."""
    hosts = []
    for group in HOSTS.findall(text):
        parts = [_expand_brackets(part) for part in re.split(r"(\[[^\]]*\])", group) if part]
        hosts += ["".join(names) for names in itertools.product(*parts)]
    return hosts


def expand_counts(text: str) -> list[int]:
    """``2(x3),1`` -> 2, 2, 2, 1.

    Raises:
        InputError: this is no such list.
    """
    counts = []
    for part in text.split(","):
        match = COUNT.fullmatch(part.strip())
        if match is None:
            raise InputError(
                f"SLURM_STEP_TASKS_PER_NODE={text}: expected numbers of tasks such as 2(x3),1."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _expand_brackets(part: str) -> list[str]:
    if not part.startswith("["):
        return [part]
    names = []
    for piece in part[1:-1].split(","):
        first, dash, last = piece.partition("-")
        if dash and first.isdecimal() and last.isdecimal():
            names += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        else:
            names.append(piece)
    return names


def _is_inherited(
    environment: Mapping[str, str], hosts: list[str], per_node: list[int], node: int
) -> bool:
    """Tell whether the step is that of a shell from which this job was submitted.

    ``sbatch`` hands its environment on, the variables of a step around it included, and the batch
    script sets only those of the job anew.
    """
    here = [task for task in environment.get("SLURM_GTIDS", "").split(",") if task]
    if here and node < len(per_node) and len(here) != per_node[node]:
        return True
    of_job = environment.get("SLURM_JOB_NODELIST")
    return of_job is not None and not set(hosts) <= set(expand_hosts(of_job))


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise InputError(
            f"SLURM_STEP_NUM_TASKS={environment['SLURM_STEP_NUM_TASKS']} and no {name}: this is "
            "half the environment of a SLURM step. Start with srun, or unset SLURM_STEP_ID to run "
            "one process."
        )
    return environment[name]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = _text(environment, name)
    if not text.isdecimal():
        raise InputError(f"{name}={text}: expected a number, as srun sets it.")
    return int(text)


def _require(environment: Mapping[str, str], holds: bool, names: str) -> None:
    if not holds:
        given = ", ".join(f"{name}={environment[name]}" for name in names.split(" and "))
        raise InputError(
            f"{given} contradict each other. Start with srun and leave its variables as they are, "
            "or unset SLURM_STEP_ID to run one process."
        )
