"""``parallelism=fsdp2``: the frozen base is cut up between the ranks, the adapter is not.

Each transformer block is a group of its own (``fully_shard``), all-gathered for its forward and
its backward pass; embeddings, norms and head are the outermost group. The base is sharded as soon
as it is loaded, and everything after that works on it as it is: the one-step gradient (its hooks
see whole activations), methods that decompose or change W (layer by layer, ``lora_one.sharding``),
validation, training, generation and export. So there is one order for all methods, and a device
never holds more than its share and one block.

torch's ``fully_shard`` is called directly: accelerate's plugin calls it as well, but inside of
``Trainer.train``, after the initialisers have needed the model. What is trained (adapters, heads,
embeddings trained in full) stays whole on every rank, where preconditioners need it whole.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from lora_one.evaluation.mode import evaluation_mode
from lora_one.harness.distributed.ranks import local_rank
from lora_one.sharding import fsdp_modules, is_sharded

# A model is gathered for its evaluation where this many times its weights are free.
ROOM_TO_GATHER = 2


def load_sharded(
    load: Callable[[torch.device], PreTrainedModel],
    device: torch.device,
    trained_in_full: Collection[str],
) -> PreTrainedModel:
    """Load the base, one rank of a node after the other, so that its memory holds one whole copy.

    Args:
        load: Loads the base onto a device.
        device: Where this rank's share goes.
        trained_in_full: Names of the modules that PEFT copies and trains; they stay whole.
    """
    ranks = torch.tensor(local_rank() + 1, device=device)
    dist.all_reduce(ranks, dist.ReduceOp.MAX)
    for _ in range(local_rank()):
        dist.barrier()
    base = load(torch.device("cpu"))
    shard(base, device, trained_in_full)
    for _ in range(local_rank(), int(ranks)):
        dist.barrier()
    return base


def shard(base: PreTrainedModel, device: torch.device, trained_in_full: Collection[str]) -> None:
    """Cut a base into the ranks' shares, in place; each rank has the same one, on the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # What PEFT freezes later is frozen now: FSDP would plan to reduce its gradients.
    base.requires_grad_(False)
    stay_whole = {
        parameter
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in trained_in_full
        for parameter in module.parameters()
    }
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(base):
        fully_shard(block, mesh=mesh, ignored_params=stay_whole)
    # By default the outermost group would stay whole after a forward pass. Then a state_dict() of
    # one rank, which cuts it up again, would leave the ranks in different states.
    fully_shard(base, mesh=mesh, ignored_params=stay_whole, reshard_after_forward=True)
    for parameter in stay_whole:
        parameter.data = parameter.data.to(device)


def blocks(base: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: the members of the outermost module lists."""
    found: list[nn.Module] = []
    for child in base.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


@contextmanager
def own_pace(model: nn.Module, *, answers: bool = False) -> Iterator[None]:
    """Let each rank run as many forward passes as it has work for; all enter and leave together.

    A forward pass of a sharded model takes all ranks, and ranks have different numbers of prompts,
    of tokens to generate, or nothing to do at all. So each forward pass is announced, and ranks
    that are done join in with an empty one of their own until nobody announces any.

    Args:
        model: Sharded or not.
        answers: Whether there are many passes to come, and nobody takes a ``state_dict``, which
            would cut a gathered base up again. Then the base is gathered where the devices have
            room for it (and for encoder-decoders, whose two halves run apart), and nobody waits
            for anybody.
    """
    if not is_sharded(model):
        yield
        return
    root = fsdp_modules(model)[0]
    if answers and (root.config.is_encoder_decoder or _has_room(root)):
        with _gathered(root):
            yield
        return

    def announce(*_: Any) -> None:
        _announce(True, root)

    handle = root.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    with evaluation_mode(root):
        while _announce(False, root).item():
            _empty_pass(root)


@contextmanager
def _gathered(root: Any) -> Iterator[None]:
    """Hold the whole base on each rank meanwhile."""
    with evaluation_mode(root):
        _empty_pass(root)  # the first one tells FSDP which module is the outermost
    modules = fsdp_modules(root)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _has_room(root: nn.Module) -> bool:
    """Whether every rank's device has room for the whole base; ranks on CPUs share one memory."""
    device = next(root.parameters()).device
    if device.type != "cuda":
        return False
    needed = sum(p.numel() * p.element_size() for p in root.parameters())
    free, _ = torch.cuda.mem_get_info(device)
    enough = torch.tensor(int(free > ROOM_TO_GATHER * needed), device=device)
    dist.all_reduce(enough, dist.ReduceOp.MIN)
    return bool(enough)


def _announce(working: bool, root: nn.Module) -> Tensor:
    """Tell all ranks whether this one runs a forward pass now; return whether any does."""
    flag = torch.tensor(int(working), device=next(root.parameters()).device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag


def _empty_pass(root: nn.Module) -> None:
    eos = root.config.eos_token_id
    token = (eos[0] if isinstance(eos, list) else eos) or 0
    ids = torch.full((1, 1), token, device=next(root.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    root(**inputs, **({"decoder_input_ids": ids} if root.config.is_encoder_decoder else {}))


class ReplicasTrainer(Trainer):
    """A Trainer of whole parameters on a sharded base: it averages their gradients itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # As for a model that transformers itself sharded: accelerate is not to wrap it again.
        self.is_distributed_loading_by_transformers = True

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Start from rank 0's parameters, as DDP does.

        The Trainer's own version would send every parameter's gradient apart.
        """
        for group in _by_dtype(model).values():
            values = torch.cat([parameter.detach().flatten() for parameter in group])
            dist.broadcast(values, src=0)
            with torch.no_grad():
                _split(values, group, [parameter.detach() for parameter in group])

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Defer nothing: the base has no gradients."""
        return nullcontext()

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Take one micro-batch; after the last of a step, average the gradients over the ranks."""
        loss = super().training_step(model, *args, **kwargs)
        if self.accelerator.sync_gradients:
            average_gradients(model)
        return loss


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace the gradients of all trained parameters by their means over the ranks.

    One all-reduce for each dtype, which is one in all but for adapters in bfloat16 beside heads or
    embeddings in float32.
    """
    for group in _by_dtype(model).values():
        for parameter in group:
            if parameter.grad is None:  # this rank's rows did not reach it, another's may have
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in group]
        # Divided first, as DDP does.
        values = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
        dist.all_reduce(values)
        _split(values, group, gradients)


def _by_dtype(model: nn.Module) -> dict[torch.dtype, list[nn.Parameter]]:
    groups: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(parameter.dtype, []).append(parameter)
    return groups


def _split(values: Tensor, group: list[nn.Parameter], targets: list[Tensor]) -> None:
    """Copy what was joined back to where it came from."""
    pieces = values.split([parameter.numel() for parameter in group])
    for target, piece in zip(targets, pieces, strict=True):
        target.copy_(piece.view_as(target))
