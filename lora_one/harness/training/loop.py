"""Training with the Hugging Face Trainer: our loss, our records, and a stop at the first NaN."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from lora_one.errors import InputError, NonFiniteError
from lora_one.evaluation.loss import token_loss_sum
from lora_one.harness.config.schema import Config, ModelConfig
from lora_one.harness.console import show_progress
from lora_one.harness.distributed.fsdp import ReplicasTrainer
from lora_one.harness.distributed.ranks import world_size
from lora_one.harness.distributed.zero import STAGES, deepspeed_arguments, make_whole
from lora_one.harness.models.base import has_bf16
from lora_one.harness.resuming import preemption
from lora_one.harness.resuming.checkpoint import Checkpoint
from lora_one.harness.resuming.resumable import (
    Fill,
    Keeper,
    ResumableTrainer,
    recall_losses,
    recall_state,
)
from lora_one.harness.training.diagnosis import locate
from lora_one.harness.training.optimizers import create_optimizer
from lora_one.harness.training.order import FilledRows
from lora_one.tasks.encoding import Collator, EncodedRows

Log = Callable[..., None]


@dataclass(frozen=True)
class Schedule:
    """How many optimiser steps a run takes, and when it looks at the validation loss."""

    accumulation: int
    steps_per_epoch: int
    total_steps: int
    eval_every: int
    warmup_steps: int


def plan_steps(model: ModelConfig, rows: int) -> Schedule:
    """Work out the schedule from the batch sizes and the number of ranks.

    Raises:
        InputError: if ``real_batch_size`` is not made of whole micro-batches on all ranks.
    """
    ranks = world_size()
    per_pass = model.per_device_batch_size * ranks
    if model.real_batch_size % per_pass:
        each, rest = divmod(model.real_batch_size, ranks)
        fitting = f"model.per_device_batch_size={each} or a divisor of it"
        if rest:
            fitting = f"a model.real_batch_size that {ranks} ranks can share"
        raise InputError(
            f"model.real_batch_size={model.real_batch_size} is not a multiple of "
            f"{model.per_device_batch_size} rows per device x {ranks} ranks = {per_pass}. Give "
            f"{fitting}."
        )
    accumulation = model.real_batch_size // per_pass
    steps_per_epoch = math.ceil(math.ceil(rows / per_pass) / accumulation)
    total = math.ceil(model.epochs * steps_per_epoch)
    if model.max_steps is not None:
        total = min(total, model.max_steps)
    eval_every = max(1, round(model.eval_epochs * steps_per_epoch))
    share = model.warmup_steps < 1
    warmup = math.ceil(total * model.warmup_steps) if share else int(model.warmup_steps)
    return Schedule(accumulation, steps_per_epoch, total, eval_every, warmup)


def train(
    config: Config,
    model: nn.Module,
    rows: EncodedRows,
    collator: Collator,
    *,
    validate: Callable[[int], float],
    log: Log,
    folder: str,
    keep: Callable[[int, Fill], None],
    checkpoint: Checkpoint | None,
    observers: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train ``model`` in place, or what is left of its training.

    The loss of a step is the mean over the supervised tokens of the whole step, whatever the
    micro-batches and ranks it is made of.

    Args:
        config: The run.
        model: The adapted (or fully trained) model.
        rows: Encoded training rows.
        collator: Makes batches of rows.
        validate: Returns the validation loss at a step; called every ``model.eval_epochs``.
        log: Takes one line of metrics as keyword arguments.
        folder: The run folder.
        keep: Writes the checkpoint of a step, given what fills its folder; called on rank 0.
        checkpoint: What to go on from; its weights are in ``model`` already.
        observers: Look on, and change nothing.

    Returns:
        Facts for the record: steps, tokens, last losses.

    Raises:
        NonFiniteError: at the first loss, gradient or weight that is not finite.
        PreemptedError: after the checkpoint of a step at which some rank was asked to stop.
    """
    schedule = plan_steps(config.model, len(rows))
    journal = Journal(schedule, validate, log)
    if checkpoint is not None and checkpoint.step == schedule.total_steps:
        state = recall_state(checkpoint)
        recall_losses(journal, checkpoint, state)
        return _facts(state, journal)
    callbacks: list[TrainerCallback] = [journal, *observers]
    if config.peft.adalora:
        callbacks.append(RankAllocation(model))
    trainer = TRAINERS[config.parallelism](
        keeper=Keeper(config.checkpoints, keep),
        losses=journal,
        checkpoint=checkpoint,
        model=model,
        args=_arguments(config, schedule, folder),
        train_dataset=FilledRows(rows),
        data_collator=collator,
        optimizers=(create_optimizer(config, model), None),
        compute_loss_func=_token_mean(model, collator.architecture, config, schedule),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    with preemption.deferred():
        trainer.train(None if checkpoint is None else str(checkpoint.path))
    if config.parallelism in STAGES:
        make_whole(model, trainer.model_wrapped)
        require_finite_weights(model, trainer.state.global_step)
    return _facts(trainer.state, journal)


def _facts(state: TrainerState, journal: "Journal") -> dict[str, Any]:
    return {
        "steps": state.global_step,
        "tokens": state.num_input_tokens_seen,
        "train_loss": journal.train_loss,
        "validation_loss": journal.validation_loss,
    }


def _arguments(config: Config, schedule: Schedule, folder: str) -> TrainingArguments:
    model, cuda = config.model, torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=model.per_device_batch_size,
        gradient_accumulation_steps=schedule.accumulation,
        max_steps=schedule.total_steps,
        learning_rate=model.learning_rate,
        lr_scheduler_type=model.schedule,
        warmup_steps=schedule.warmup_steps,
        max_grad_norm=model.max_grad_norm or 0.0,
        logging_steps=model.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        activation_checkpointing=model.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=model.bf16 and not config.peft.use_peft and has_bf16(),
        seed=model.seed,
        data_seed=model.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=not cuda,
        **deepspeed_arguments(config.parallelism),
        dataloader_pin_memory=cuda,
        ddp_find_unused_parameters=False,
    )
    # One process, one device: without this the Trainer would wrap the model in DataParallel on a
    # node with several GPUs, and every step would silently take as many times the rows.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _token_mean(
    model: nn.Module, architecture: str, config: Config, schedule: Schedule
) -> Callable[..., torch.Tensor]:
    """Make the loss: summed cross entropy over the step's number of supervised tokens."""

    def loss(
        outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int
    ) -> torch.Tensor:
        value = token_loss_sum(outputs.logits, labels, architecture) / num_items_in_batch
        if config.peft.adalora:
            share = schedule.accumulation * world_size()
            value = value + _adalora_orthogonality(model) / share
        return value

    return loss


def _adalora_orthogonality(model: nn.Module) -> torch.Tensor:
    """AdaLoRA's regulariser, mean of ||P^T P - I|| and ||Q Q^T - I|| (Zhang et al., 2023, eq. 4).

    PEFT adds it to a loss that the model computes itself, which ours is not.
    """
    adapter = model.trainable_adapter_name
    penalties = []
    for name, factor in model.named_parameters():
        if adapter in name and ("lora_A" in name or "lora_B" in name):
            gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
            penalties.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)))
    return model.peft_config[adapter].orth_reg_weight * torch.stack(penalties).mean()


class GuardedTrainer(ResumableTrainer):
    """A Trainer that stops at the first loss, gradient or kept weight that is not finite."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Take one micro-batch forward and backward, and look at what came out."""
        inputs = self._prepare_inputs(inputs)
        loss = super().training_step(model, dict(inputs), *args, **kwargs)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        finite = torch.isfinite(loss) & torch.isfinite(torch.nn.utils.get_total_norm(gradients))
        if not finite:
            step = self.state.global_step + 1
            raise NonFiniteError(f"step {step}: loss {loss.item()}; {locate(model, inputs)}")
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        require_finite_weights(self.model, self.state.global_step)
        super()._save_checkpoint(model, trial)


class ShardedTrainer(GuardedTrainer, ReplicasTrainer):
    """On a base that is cut up between ranks; looks at the averaged gradients."""


class DeepSpeedTrainer(GuardedTrainer):
    """Under DeepSpeed, whose optimiser keeps its state in pieces: it has no checkpoints."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.control.should_save = False
        if self.keeper.stop is not None:
            preemption.leave_in_peace()
            raise self.keeper.stop.error("DeepSpeed keeps no checkpoint, the run starts again")


TRAINERS = {
    "ddp": GuardedTrainer,
    "fsdp2": ShardedTrainer,
    "zero2": DeepSpeedTrainer,
    "zero3": DeepSpeedTrainer,
}


def require_finite_weights(model: nn.Module, step: int) -> None:
    """Raise NonFiniteError if the last update left a trained weight infinite or NaN."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise NonFiniteError(f"step {step}: the weight of {name} is not finite")


class Journal(TrainerCallback):
    """Writes losses down, looks at the validation loss now and then, and shows a progress bar."""

    def __init__(self, schedule: Schedule, validate: Callable[[int], float], log: Log) -> None:
        self.schedule = schedule
        self.validate = validate
        self.log = log
        self.train_loss = math.nan
        self.validation_loss = math.nan
        self.bar: tqdm | None = None

    def on_train_begin(self, _: Any, state: TrainerState, *__: Any, **___: Any) -> None:
        """Open the bar."""
        self.bar = tqdm(
            total=self.schedule.total_steps,
            initial=state.global_step,
            desc="train",
            leave=False,
            disable=not show_progress(),
        )

    def on_log(
        self, _: Any, state: TrainerState, __: TrainerControl, logs: dict[str, float], **___: Any
    ) -> None:
        """Keep what the Trainer reports, but for its closing summary."""
        if "loss" not in logs:
            return
        self.train_loss = logs["loss"]
        self.log(step=state.global_step, **logs)
        self._show()

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        """Advance the bar; ask for the validation loss at the planned steps and at the last."""
        self.bar.update()
        step = state.global_step
        control.should_evaluate = (
            step % self.schedule.eval_every == 0 or step == self.schedule.total_steps
        )

    def validate_now(self, state: TrainerState) -> None:
        """Take the validation loss and write it down."""
        step = state.global_step
        self.validation_loss = self.validate(step)
        self.log(step=step, epoch=state.epoch, validation_loss=self.validation_loss)
        self._show()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the bar."""
        self.bar.close()

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{self.train_loss:.3f}", valid=f"{self.validation_loss:.3f}")


class RankAllocation(TrainerCallback):
    """AdaLoRA's pruning: after the gradients, before they are cleared."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_optimizer_step(
        self, _: Any, state: TrainerState, __: TrainerControl, **___: Any
    ) -> None:
        """Move the rank budget to where the importance scores say."""
        self.model.base_model.update_and_allocate(state.global_step)
