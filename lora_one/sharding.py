"""A base whose weights FSDP2 (``fully_shard``) has cut up: its own rows here, the rest elsewhere.

A weight is a ``DTensor`` outside of its block's forward and backward pass, and whole inside. What
is called collective has to be called by all ranks, in the same order.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that ``fully_shard`` was applied to, outer ones first."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass takes all ranks."""
    return bool(fsdp_modules(model))


def reshard(model: nn.Module) -> None:
    """Drop whole weights that the last forward pass has left, so that all are cut up."""
    for module in fsdp_modules(model):
        module.reshard()


def is_cut(weight: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``."""
    return hasattr(weight, "placements")


def own_part(weight: Tensor) -> Tensor:
    """Return the rows that this rank holds; without communication."""
    return weight.to_local() if is_cut(weight) else weight


def whole(weight: Tensor) -> Tensor:
    """Return all of a tensor. Collective where it is cut."""
    return weight.full_tensor() if is_cut(weight) else weight


@torch.no_grad()
def overwrite(weight: Tensor, value: Tensor) -> None:
    """Store the own rows of ``value``, which all ranks hold alike, in a cut weight."""
    from torch.distributed.tensor import distribute_tensor

    # No source rank: each cuts its own copy, without communication.
    cut = distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.to_local().copy_(cut.to_local())
