"""The stages of one run, as ``run_exp.py`` lists them. Each does its work and leaves its facts."""

import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lora_one.diagnostics import gradient_spaces
from lora_one.errors import NonFiniteError
from lora_one.evaluation.journal import FINAL, discard
from lora_one.evaluation.loss import mean_token_loss
from lora_one.harness import evaluation
from lora_one.harness import export as exporting
from lora_one.harness import plan as planning
from lora_one.harness.card import write_card
from lora_one.harness.config.schema import Config
from lora_one.harness.console import say
from lora_one.harness.data.rows import Batch, batches_of, remarks, sandbox_remark
from lora_one.harness.distributed import fsdp
from lora_one.harness.distributed.devices import device, require_devices
from lora_one.harness.distributed.peers import agree
from lora_one.harness.distributed.ranks import connect, is_main, rank, world_size
from lora_one.harness.models.adapter import trained_in_full
from lora_one.harness.models.base import base_dtype, has_bf16, load_base, weights_fingerprint
from lora_one.harness.plan import Plan
from lora_one.harness.records.folder import other_diagnostics
from lora_one.harness.records.provenance import provenance
from lora_one.harness.records.record import RunRecord
from lora_one.harness.resuming import resume
from lora_one.harness.resuming.checkpoint import Checkpoint
from lora_one.harness.resuming.resumable import Fill
from lora_one.harness.tracking.tracker import Tracker, start_tracking
from lora_one.harness.training import diagnostics, initialization, loop
from lora_one.harness.training.diagnosis import NOTHING_FOUND, locate
from lora_one.harness.training.diagnostics import Observer, Spaces, measurement
from lora_one.harness.training.init_table import show_layers

# Metrics that are different every time.
TIMES = ("seconds", "answers_per_second")

__all__ = [
    "describe_export",
    "evaluate",
    "export",
    "initialise",
    "load",
    "make_plan",
    "open_record",
    "rehearse_export",
    "report_done",
    "report_finished",
    "take_reference",
    "tracking",
    "train",
]


def make_plan(config: Config) -> Plan:
    """Think the run through, on all ranks before anything is written on one.

    Raises:
        InputError: whatever would stop the run; ranks that see other rows or too few devices.
    """
    plan = planning.make_plan(config)
    require_devices(config.parallelism)
    agree("data", plan.data.facts)
    return plan


def open_record(config: Config, plan: Plan, record: RunRecord) -> RunRecord:
    """Open the run folder, as new or as the newest checkpoint of an earlier attempt left it."""
    return record.open(_find_checkpoint(config, plan, record))


def _find_checkpoint(config: Config, plan: Plan, record: RunRecord) -> Checkpoint | None:
    """Return what an earlier attempt left to go on from, if it is one of the same run."""
    if plan.schedule is None:
        return None
    found = resume.find_checkpoint(
        record.folder,
        lambda: resume.identity_of(config, plan.data, weights_fingerprint(plan.base)),
        say,
    )
    if found is not None:
        say(f"resuming from step {found.step}")
    return found


def load(config: Config, plan: Plan, record: RunRecord) -> PreTrainedModel:
    """Load the base model and write down what it is, what it learns from, and on what machine."""
    sandbox = sandbox_remark(config, plan.data.task)
    for remark in [*remarks(plan.data.facts, config.model.max_length), *filter(None, [sandbox])]:
        say(f"note: {remark}")
    if is_main():
        _keep_tokens(plan)
    record.update(
        architecture=plan.base.architecture,
        model={"name": config.model.name, "fingerprint": weights_fingerprint(plan.base)},
        data=plan.data.facts,
        command=shlex.join(["python", *sys.argv]),
        provenance=provenance(),
    )
    if plan.given is not None:
        given = {"path": str(plan.given.path), "sha256": plan.given.sha256, "base": plan.given.base}
        record.update(adapter=given)
    connect()
    torch.manual_seed(config.model.seed)
    dtype = base_dtype(config)
    if config.model.bf16 and not has_bf16():
        say("note: this GPU has no bfloat16 arithmetic; computing in float32")
    place = device()
    if config.parallelism == "fsdp2":
        return fsdp.load_sharded(
            lambda where: load_base(plan.base, config.model, where, dtype),
            place,
            trained_in_full(plan.base, plan.adapter),
        )
    return load_base(plan.base, config.model, place, dtype)


def _keep_tokens(plan: Plan) -> None:
    """Keep the tokenised rows for later runs; a run can do without."""
    try:
        plan.data.splits.save()
    except OSError as error:
        say(f"warning: the tokenised rows could not be kept for later runs: {error}")


def take_reference(
    config: Config, plan: Plan, base: PreTrainedModel, record: RunRecord
) -> Spaces | None:
    """Decompose the base model's one-step gradient, which ``diagnostics=`` compares with, if so.

    A run that goes on has done so already.
    """
    if not plan.diagnosed:
        return None
    if record.resumed is not None:
        return diagnostics.load_spaces(record.resumed.path)
    directions = config.diagnostics.rank or config.peft.lora_r
    with record.phase("diagnostics"):
        spaces, seen = gradient_spaces(
            base,
            plan.reference[rank() :: world_size()],
            plan.diagnosed,
            directions,
            seed=config.init.seed,
            keeps=is_main(),
        )
    facts = {"layers": plan.diagnosed, "rank": directions, "tokens": seen.tokens, "loss": seen.loss}
    record.update(diagnostics={"settings": config.diagnostics.model_dump(), **facts})
    say(
        f"diagnostics: {len(plan.diagnosed)} layers, {directions} directions of the gradient of "
        f"{seen.tokens:,} tokens"
    )
    return spaces


def initialise(
    config: Config, plan: Plan, base: PreTrainedModel, record: RunRecord, tracker: Tracker
) -> Any:
    """Attach and start the adapter; keep the validation loss of the base and of the start.

    A run that goes on has done so already.
    """
    if record.resumed is not None:
        return initialization.restore(config, plan, base, record.resumed)
    base_loss = _validation_loss(config, plan, base, record, "base model")
    if base_loss is not None:
        _log(record, tracker, step=0, base_validation_loss=base_loss)
    model, report = initialization.initialise(config, plan, base)
    start_loss = _validation_loss(config, plan, model, record, "initialised model")
    if start_loss is not None:
        _log(record, tracker, step=0, epoch=0.0, validation_loss=start_loss)
    record.write_json("init.json", report)
    record.update(
        losses={"base_validation": base_loss, "start_validation": start_loss},
        init={name: report.get(name) for name in ("seconds", "cached", "stable_gamma")},
    )
    if "rank_allocation" in report:
        say(f"ranks: {report['rank_allocation']['summary']}")
    origin = " (from the cache)" if report.get("cached") else ""
    losses = _losses(base_loss, start_loss)
    say(f"init: {report.get('summary', report['method'])}{origin}{losses}")
    for warning in report.get("warnings", []):
        say(f"warning: {warning}")
    if config.verbose:
        show_layers(report)
    return model


def rehearse_export(config: Config, plan: Plan, model: Any, record: RunRecord) -> None:
    """Try the export now, so that it cannot fail after the training."""
    if not config.trains or record.resumed is not None:
        return
    with fsdp.own_pace(model):
        if is_main():
            exporting.rehearse_export(config, plan.base, model, record.folder, _probe(plan))


def train(
    config: Config,
    plan: Plan,
    model: Any,
    reference: Spaces | None,
    record: RunRecord,
    tracker: Tracker,
) -> None:
    """Train, and keep the losses; with ``train=none`` the start is the result."""
    if plan.schedule is None:
        losses = record.facts["losses"]
        losses |= {"train": None, "validation": losses["start_validation"]}
        record.update(train={"steps": 0, "tokens": 0, "tokens_per_second": None})
        return
    schedule, settings = plan.schedule, config.model
    say(
        f"train: {schedule.total_steps} steps of {settings.per_device_batch_size} rows x "
        f"{schedule.accumulation} accumulation x {world_size()} ranks = {settings.real_batch_size}"
    )
    if schedule.warmup_steps >= schedule.total_steps:
        say(
            f"warning: all {schedule.total_steps} steps lie in the warm-up of "
            f"{schedule.warmup_steps}, whose first step has rate 0; lower model.warmup_steps"
        )
    identity = resume.identity_of(config, plan.data, record.facts["model"]["fingerprint"])

    def keep(step: int, fill: Fill) -> None:
        def fill_and_identify(folder: Path) -> None:
            fill(folder)
            resume.write_identity(folder, identity)
            if reference is not None:
                diagnostics.save_spaces(reference, folder)

        record.keep(step, fill_and_identify)

    facts = loop.train(
        config,
        model,
        plan.data.train,
        plan.collator,
        validate=lambda step: _validation_loss(config, plan, model, record, f"step {step}"),
        log=lambda **values: _log(record, tracker, **values),
        folder=str(record.folder),
        keep=keep,
        checkpoint=record.resumed,
        observers=_observers(config, plan, model, reference, record, tracker),
    )
    record.facts["losses"] |= {
        "train": facts.pop("train_loss"),
        "validation": facts.pop("validation_loss"),
    }
    facts["tokens_per_second"] = round(facts["tokens"] / record.seconds("train"), 1)
    record.update(train=facts)


def _observers(
    config: Config,
    plan: Plan,
    model: Any,
    reference: Spaces | None,
    record: RunRecord,
    tracker: Tracker,
) -> list[Observer]:
    if reference is None or not is_main():
        return []
    values = measurement(model, plan.diagnosed, reference)

    def observe(step: int) -> None:
        with record.phase("diagnostics"):
            _log(record, tracker, step=step, **values())

    every = config.diagnostics.every_steps or config.model.logging_steps
    return [Observer(model, observe, every, plan.schedule.total_steps)]


def evaluate(config: Config, plan: Plan, model: Any, record: RunRecord, tracker: Tracker) -> None:
    """Answer the test rows and score every answer, or take the loss that is asked for."""
    if config.evaluation.metric != "task":
        _measure_loss(config, plan, model, record, tracker)
        return
    base_weights = record.facts["model"]["fingerprint"]
    result, facts = evaluation.evaluate(config, plan, model, record.folder, base_weights)
    if not is_main():
        return
    record.write_lines(FINAL, result.rows)
    discard(record.folder)
    metrics = {"validation_loss": record.facts["losses"]["validation"], **result.metrics}
    primary = plan.data.task.primary_metric
    record.update(metrics=metrics, primary_metric=primary, evaluation=facts)
    # Without the times: a run that was stopped and went on leaves the same lines.
    values = {name: value for name, value in result.metrics.items() if name not in TIMES}
    _log(record, tracker, step=record.facts["train"]["steps"], **values)


def _measure_loss(
    config: Config, plan: Plan, model: Any, record: RunRecord, tracker: Tracker
) -> None:
    """Let a loss be the result: that of the test rows, or the validation loss that is known."""
    validation = record.facts["losses"]["validation"]
    rows = plan.data.facts["rows"]["validation"]
    metrics = {"validation_loss": validation, "n": rows}
    primary = "validation_loss"
    if config.evaluation.metric == "loss":
        primary = "test_loss"
        metrics |= evaluation.test_loss(config, plan, model)
        _log(record, tracker, step=record.facts["train"]["steps"], test_loss=metrics[primary])
    record.update(metrics=metrics, primary_metric=primary)


def export(config: Config, plan: Plan, model: Any, record: RunRecord) -> None:
    """Write the adapter for the untouched base and check it; one that is there already stays."""
    if plan.given is not None:
        return
    with fsdp.own_pace(model):
        if not is_main():
            return
        folder, probe = record.folder, _probe(plan)
        facts = exporting.export(config, plan.base, plan.tokenizer, model, folder, probe)
    record.update(export=facts)
    difference = facts["largest_logit_difference"]
    if difference is not None:
        say(f"export: {exporting.describe_rank(facts)}, {_compared(difference)}")


def _compared(difference: float) -> str:
    if difference == 0:
        return "the reloaded adapter gives the same logits"
    return f"the reloaded adapter's logits differ by at most {difference:.1e}"


def describe_export(config: Config, record: RunRecord) -> None:
    """Write the adapter's card, now that its metrics are known."""
    if is_main() and "export" in record.facts:
        write_card(config, record.folder, record.facts)


@contextmanager
def tracking(config: Config, record: RunRecord) -> Iterator[Tracker]:
    """Let the tracker follow the run, whose record is open, to its end, however it ends."""
    tracker = start_tracking(config, record)
    try:
        yield tracker
    finally:
        tracker.finish()


def report_done(record: RunRecord) -> dict[str, Any]:
    """Print what came out, and where it lies."""
    return _report(record, record.facts, "done")


def report_finished(record: RunRecord) -> dict[str, Any]:
    """Say that an earlier run of the same configuration stands."""
    finished = record.finished
    remark = other_diagnostics(record.config, finished)
    if remark is not None:
        say(f"note: {record.run_id} is finished {remark}")
    return _report(record, finished, "already done")


def _report(record: RunRecord, facts: dict[str, Any], word: str) -> dict[str, Any]:
    if is_main():
        metrics, losses, metric = facts["metrics"], facts["losses"], facts["primary_metric"]
        result = f"{metric} {metrics[metric]:.4f}" if metric in metrics else "replies not judged"
        change = _losses(losses["base_validation"], losses["validation"])
        say(f"{word}: {result} (n = {metrics['n']}){change}; {record.folder}")
    return facts


def _losses(before: float | None, after: float | None) -> str:
    return "" if before is None else f", validation loss {before:.4f} -> {after:.4f}"


def _validation_loss(
    config: Config, plan: Plan, model: Any, record: RunRecord, when: str
) -> float | None:
    """The mean loss over the validation rows; None where there are none."""
    if plan.data.validation is None:
        return None
    rows, size = plan.data.validation.rows, config.model.per_device_batch_size
    with record.phase("eval"):
        batches = batches_of(rows, size, plan.collator)
        loss = mean_token_loss(model, batches, plan.base.architecture).mean
        if not math.isfinite(loss):
            raise NonFiniteError(f"{when}: validation loss {loss}; {_locate(model, batches)}")
        return loss


def _locate(model: Any, batches: list[Batch]) -> str:
    """Look at one batch after the other until something is found."""
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        if (found := locate(model, inputs)) != NOTHING_FOUND:
            return found
    return NOTHING_FOUND


def _probe(plan: Plan) -> Batch:
    return plan.collator(plan.data.probe)


def _log(record: RunRecord, tracker: Tracker, **values: Any) -> None:
    record.log(**values)
    tracker.notice()
