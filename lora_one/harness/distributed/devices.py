"""Which accelerator a rank works on, and whether each rank has one to itself."""

import os
import platform
from typing import Any

import torch

from lora_one.errors import InputError
from lora_one.harness.distributed.parallelism import DEEPSPEED
from lora_one.harness.distributed.peers import gather
from lora_one.harness.distributed.ranks import local_rank, local_world_size, world_size


def device() -> torch.device:
    """Return this rank's device, which becomes the current one; without GPUs it is the CPU.

    accelerate counts the same way. Where SLURM binds one GPU to each task, a task sees that one
    only, and its index is 0 on every rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    chosen = torch.device("cuda", local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(chosen)
    return chosen


def require_devices(parallelism: str) -> None:
    """Require that no two ranks share a GPU, and that all have one or none has.

    Raises:
        InputError: on all ranks; it names two of them, or one that DeepSpeed would send to a GPU
            that it does not see.
    """
    if world_size() == 1:
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mine = {
        "host": platform.node(),
        "gpus": gpus,
        "ranks": local_world_size(),
        "number": local_rank(),
        "gpu": _name(device()) if gpus else None,
    }
    ranks = gather(mine)
    check_devices(ranks)
    if parallelism in DEEPSPEED:
        check_numbers(ranks)


def check_devices(ranks: list[dict[str, Any]]) -> None:
    """Check what the ranks say of their devices; see ``require_devices``."""
    owners: dict[str, int] = {}
    for number, found in enumerate(ranks):
        if (found["gpu"] is None) != (ranks[0]["gpu"] is None):
            raise InputError(
                f"rank {number} on host {found['host']} sees {found['gpus']} GPUs and rank 0 on "
                f"host {ranks[0]['host']} sees {ranks[0]['gpus']}: give all ranks a GPU, or none."
            )
        if found["gpu"] is None:
            continue
        owner = owners.setdefault(found["gpu"], number)
        if owner != number:
            raise InputError(
                f"ranks {owner} and {number} on host {found['host']} would share a GPU: "
                f"{found['ranks']} ranks on this machine, and each sees {found['gpus']} GPUs. "
                "Start one rank per GPU: srun --gpus-per-task=1, torchrun --nproc-per-node=gpu."
            )


def check_numbers(ranks: list[dict[str, Any]]) -> None:
    """Check that every rank sees the GPU whose number is its own on the node, as DeepSpeed needs.

    Raises:
        InputError: on all ranks; it names one that does not.
    """
    for number, found in enumerate(ranks):
        if found["gpu"] is not None and found["number"] >= found["gpus"]:
            raise InputError(
                f"rank {number} is number {found['number']} on host {found['host']} and sees "
                f"{found['gpus']} GPUs, and DeepSpeed takes the GPU of that number. Let all ranks "
                "of a node see all of its GPUs (srun --gpus-per-node instead of --gpus-per-task), "
                "or give parallelism=ddp or fsdp2."
            )


def _name(gpu: torch.device) -> str:
    """Name a GPU as no other in the cluster is."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # Parts of one GPU, which the driver may give one identity.
    if visible[0].startswith("MIG-") and gpu.index < len(visible):
        return visible[gpu.index]
    return str(torch.cuda.get_device_properties(gpu).uuid)
