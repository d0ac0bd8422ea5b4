"""The processes of one run: who this one is, whichever launcher started it; imports no torch.

``torchrun`` and ``accelerate launch`` say it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. A bare ``srun -n N`` says it in variables of its own, which ``identify`` translates.
"""

import os
from collections.abc import MutableMapping
from datetime import timedelta

from lora_one.errors import InputError
from lora_one.harness.distributed.slurm_step import SlurmStep, read_step

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
POINT = "LORA_ONE_POINT"
"""Names the point of a sweep to its processes, so that they meet each other and no one else."""
# Below what Linux gives to outgoing connections (32768 and up) and above common services; the
# upper half is for the ranks' own channel (peers/meeting.py).
FIRST_PORT, PORTS = 10240, 11264
PORTS_OF_A_JOB = 16
# Ranks wait for one that loads a large base, writes a checkpoint or answers the last rows; nccl by
# itself gives up after 10 minutes. A rank that fails or dies is known without it (peers).
PATIENCE = timedelta(hours=2)


def rank() -> int:
    """Return this process's rank."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's rank on its own node, which decides its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Tell whether this process is the one that writes and speaks."""
    return rank() == 0


def identify(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let RANK and its companions say who this process is; what is there already stays.

    Child processes inherit them. A batch script, a shell of ``salloc`` and a step with one task
    are one process, whatever number of tasks the job has.

    Raises:
        InputError: half a launcher's environment, or variables that contradict each other.
    """
    if "RANK" not in environment:
        # Known first, so that what is wrong with the others is said by one rank.
        speaker = environment.get("SLURM_PROCID") or environment.get("LOCAL_RANK") or "0"
        try:
            step = read_step(environment)
            if step is not None:
                _take(environment, step)
            elif environment.get("WORLD_SIZE", "1") == "1":
                return
            else:
                _refuse_half(environment)
        except InputError:
            environment["RANK"] = speaker
            raise
    _check(environment)


def connect() -> None:
    """Form the process group, nccl on GPUs and gloo on CPUs, if there are several ranks.

    The Trainer would do so too, but only after the initialisers need it.
    """
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        from lora_one.harness.distributed.peers import settle_port

        settle_port()
        # accelerate would tell DDP that the GPU has the local rank's number, and a rank that sees
        # its own GPU alone sees it as number 0. DDP that is not told goes by the model.
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def environment_of_point(name: str) -> dict[str, str]:
    """Return the environment in which this rank starts its process of a sweep's point.

    Each point forms a process group of its own, and not on the launcher's store, which still
    holds the keys of the group before.
    """
    environment = dict(os.environ)
    if world_size() > 1:
        environment |= {POINT: name, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return environment


def port_of(step: SlurmStep) -> int:
    """Return a port that all tasks of a step agree on and that jobs on a node do not share."""
    return FIRST_PORT + (step.job * PORTS_OF_A_JOB + step.step) % PORTS


def _take(environment: MutableMapping[str, str], step: SlurmStep) -> None:
    """Translate; an address or port that the user chose stays."""
    given = environment.get("WORLD_SIZE")
    if given not in (None, str(step.tasks)):
        raise InputError(
            f"WORLD_SIZE={given} contradicts SLURM_STEP_NUM_TASKS={step.tasks}. Unset WORLD_SIZE: "
            "srun -n says how many ranks there are."
        )
    environment |= {
        "RANK": str(step.rank),
        "WORLD_SIZE": str(step.tasks),
        "LOCAL_RANK": str(step.local_rank),
        "LOCAL_WORLD_SIZE": str(step.local_tasks),
    }
    # A node's name need not lead to it from itself; this address always does.
    address = step.hosts[0] if len(step.hosts) > 1 else "127.0.0.1"
    environment.setdefault("MASTER_ADDR", address)
    environment.setdefault("MASTER_PORT", str(port_of(step)))


def _check(environment: MutableMapping[str, str]) -> None:
    """Refuse what a launcher would not say."""
    numbers = {
        name: environment[name]
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        if name in environment
    }
    for name, text in numbers.items():
        if not text.isdecimal():
            raise InputError(f"{name}={text}: expected a number, as launchers set it.")
    size = int(numbers.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" not in numbers and numbers["RANK"] == "0":
        return
    if int(numbers["RANK"]) >= size:
        shown = numbers.get("WORLD_SIZE", "not set")
        raise InputError(
            f"RANK={numbers['RANK']} and WORLD_SIZE {shown}: ranks count from 0 to WORLD_SIZE - 1. "
            "Start with torchrun, accelerate launch or srun, which set both."
        )
    if size > 1:
        _refuse_half(environment)


def _refuse_half(environment: MutableMapping[str, str]) -> None:
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} and no {', '.join(missing)}: this is half a "
            "launcher's environment. Start with torchrun, accelerate launch or srun, or unset "
            "WORLD_SIZE to run one process."
        )
