"""A Hugging Face Trainer that stops and goes on without a trace, bit for bit.

The Trainer skips the rows that were seen; what it would keep in pickles (optimiser, generators) is
kept by ``training_state``, and what it would forget (the loss summed since the last line, a
validation that a stop left undone) is kept here. The methods with an underscore are the Trainer's
own; ``tests/harness/test_resume.py`` says whether another version still calls them.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from lora_one.harness.config.schema import CheckpointsConfig
from lora_one.harness.distributed.ranks import is_main, rank, world_size
from lora_one.harness.resuming import preemption
from lora_one.harness.resuming.checkpoint import Checkpoint
from lora_one.harness.resuming.preemption import Reason
from lora_one.harness.resuming.training_state import (
    load_optimizer,
    pack_rank,
    restore_generators,
    save_model,
    save_optimizer,
    unpack_loss,
)
from lora_one.harness.training.order import Order
from lora_one.tasks.encoding import IGNORED

PROGRESS = "progress.json"

Fill = Callable[[Path], None]


class Losses(Protocol):
    """What writes losses down, see ``loop.Journal``."""

    train_loss: float
    validation_loss: float

    def validate_now(self, state: TrainerState) -> None:
        """Take the validation loss and write it down."""


class Keeper(TrainerCallback):
    """Decides after every step, on all ranks alike, whether to keep it and whether to stop.

    Args:
        settings: When.
        write: Writes the checkpoint of a step, given what fills its folder; on rank 0.
    """

    def __init__(self, settings: CheckpointsConfig, write: Callable[[int, Fill], None]) -> None:
        self.write = write
        self.stop: Reason | None = None
        self._settings = settings
        self._newest = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin to count the seconds."""
        self._newest = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask all ranks, and have the Trainer call ``_save_checkpoint`` if one of them says so."""
        asked = preemption.requested() or 0
        stop, due = _largest([asked, self._is_due(state.global_step)], args.device)
        self.stop = Reason(stop) if stop else None
        control.should_save = bool(stop or due) or state.global_step == state.max_steps

    def kept(self) -> None:
        """Count the seconds from here."""
        self._newest = time.monotonic()

    def _is_due(self, step: int) -> bool:
        """Rank 0's clock decides."""
        if not is_main():
            return False
        steps, seconds = self._settings.every_steps, self._settings.every_seconds
        by_step = steps is not None and step % steps == 0
        return by_step or (seconds is not None and time.monotonic() - self._newest >= seconds)


class ResumableTrainer(Trainer):
    """See the module.

    Args:
        keeper: Decides when to keep.
        losses: Writes losses down.
        checkpoint: What to go on from; its weights are in the model already.
        kwargs: For the Trainer.
    """

    def __init__(
        self, *, keeper: Keeper, losses: Losses, checkpoint: Checkpoint | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.keeper, self.losses, self.checkpoint = keeper, losses, checkpoint
        self.owes_validation = False
        self.add_callback(_Continuation(self))
        self.add_callback(keeper)

    def _get_train_sampler(self, *_: Any, **__: Any) -> Order:
        ranks = world_size()
        # One process has nobody to wait for: its last micro-batch of an epoch is a smaller one.
        per_pass = self.args.per_device_train_batch_size * ranks if ranks > 1 else 1
        return Order(len(self.train_dataset), per_pass, self.args.data_seed)

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        """Count the tokens of rows, not of those that are blank."""
        labels = inputs["labels"]
        taught = (labels != IGNORED).view(len(labels), -1).any(1)
        mask = inputs["attention_mask"] * taught[:, None]
        super()._track_num_input_tokens({**inputs, "attention_mask": mask})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without the Trainer's own speed, which a resumed run could not repeat."""
        super().log(logs)

    def _evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        # Asked for a second time at the end of an epoch.
        self.control.should_evaluate = False
        if self.keeper.stop is None:
            self.losses.validate_now(self.state)
        else:
            # Little time is left: the next attempt begins with it.
            self.owes_validation = True
        return {}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.control.should_save = False
        packed = _gather(pack_rank(self._tr_loss), self.args.device)
        if is_main():
            self.keeper.write(self.state.global_step, lambda folder: self._fill(folder, packed))
        if dist.is_initialized():
            # No rank may leave, and be restarted, before the checkpoint is there.
            dist.barrier()
        self.keeper.kept()
        if self.keeper.stop is not None:
            raise preemption.stop(self.keeper.stop, self.state.global_step)

    def _fill(self, folder: Path, packed: list[bytes]) -> None:
        save_model(self.model, folder)
        save_optimizer(_inner(self.optimizer), self.lr_scheduler, folder)
        for index, data in enumerate(packed):
            _rank_file(folder, index).write_bytes(data)
        # The log is in metrics.jsonl, and would make every checkpoint a little longer.
        state = dataclasses.asdict(self.state) | {"log_history": []}
        (folder / TRAINER_STATE_NAME).write_text(json.dumps(state), encoding="utf-8")
        progress = {
            "last_logged_step": self._globalstep_last_logged,
            "train_loss": _to_json(self.losses.train_loss),
            "validation_loss": _to_json(self.losses.validation_loss),
            "owes_validation": self.owes_validation,
        }
        (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")

    def _load_from_checkpoint(self, *_: Any, **__: Any) -> None:
        """The weights are there already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer(_inner(self.optimizer), self.lr_scheduler, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_generators(_rank_file(Path(checkpoint), rank()).read_bytes())

    def recall(self, checkpoint: Checkpoint) -> None:
        """Take up the sums, which the Trainer has just set to zero."""
        packed = _rank_file(checkpoint.path, rank()).read_bytes()
        self._tr_loss = unpack_loss(packed).to(self.args.device)
        self._globalstep_last_logged = checkpoint.read_json(PROGRESS)["last_logged_step"]
        recall_losses(self.losses, checkpoint, self.state)


def recall_losses(losses: Losses, checkpoint: Checkpoint, state: TrainerState) -> None:
    """Take up the last losses, and the validation that the stop left undone."""
    progress = checkpoint.read_json(PROGRESS)
    losses.train_loss = _from_json(progress["train_loss"])
    losses.validation_loss = _from_json(progress["validation_loss"])
    if progress["owes_validation"]:
        losses.validate_now(state)


def recall_state(checkpoint: Checkpoint) -> TrainerState:
    """Return the Trainer's state of a checkpoint."""
    return TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE_NAME))


class _Continuation(TrainerCallback):
    """Takes up where the checkpoint left, in the order of rows too."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self._trainer.checkpoint is not None:
            self._trainer.recall(self._trainer.checkpoint)

    def on_epoch_begin(
        self, _: Any, state: TrainerState, __: TrainerControl, train_dataloader: Any, **___: Any
    ) -> None:
        """Shuffle by the number of the epoch, also where accelerate wraps the sampler too deep."""
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        batches.sampler.set_epoch(int(state.epoch))


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _rank_file(folder: Path, index: int) -> Path:
    return folder / f"rank-{index}.safetensors"


def _largest(values: list[int], device: torch.device) -> list[int]:
    """Return the largest of each value over all ranks."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def _gather(data: bytes, device: torch.device) -> list[bytes]:
    """Bring equally long bytes of all ranks together."""
    if world_size() == 1:
        return [data]
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return [bytes(part.cpu().numpy()) for part in parts]


def _to_json(loss: float) -> float | None:
    return None if math.isnan(loss) else loss


def _from_json(loss: float | None) -> float:
    return math.nan if loss is None else loss
