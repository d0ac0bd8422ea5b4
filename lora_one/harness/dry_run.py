"""``dry_run=true``: what would run, on what, for how long; no weights, no GPU, nothing written."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft import get_peft_model
from rich.console import Console
from rich.table import Table

from lora_one.adapters.allocation import LARGEST
from lora_one.errors import InputError
from lora_one.harness.config.schema import Config
from lora_one.harness.console import make_console, quiet_libraries
from lora_one.harness.data.rows import make_task, require_consent
from lora_one.harness.distributed.parallelism import require_plain_launcher
from lora_one.harness.distributed.ranks import is_main
from lora_one.harness.models.base import Base, find_base, skeleton
from lora_one.harness.plan import make_plan, plan_adapter
from lora_one.harness.records.folder import read_record, run_id
from lora_one.harness.training.diagnostics import choose_layers
from lora_one.harness.training.loop import plan_steps
from lora_one.tasks import Origin
from lora_one.tasks.registry import TASKS


@dataclass(frozen=True)
class Outlook:
    """What can be said of a run without loading its weights."""

    base: Base
    origin: Origin
    layers: dict[str, int]
    trainable: int
    total: int
    rows: int | None
    steps: int | None
    memory_bytes: int


def show_plan(configs: Sequence[Config]) -> None:
    """Print the runs as a table, and the outlook of each different model and adapter.

    Raises:
        InputError: whatever would stop the runs before they begin.
    """
    quiet_libraries()
    console = make_console()
    console.quiet = not is_main()
    distinct = {_kind(config): config for config in configs}
    outlooks = {kind: (config, foresee(config)) for kind, config in distinct.items()}
    table = Table(title="dry run: nothing is loaded or written", title_justify="left", box=None)
    for column in ("method", "optimiser", "lr", "seed", "steps", "state", "run"):
        table.add_column(column, overflow="fold")
    for config in configs:
        _, outlook = outlooks[_kind(config)]
        record = read_record(Path(config.output_dir) / run_id(config)) or {}
        table.add_row(
            config.method,
            config.optimizer.name if config.trains else "none",
            f"{config.model.learning_rate:g}" if config.trains else "-",
            str(config.seed),
            "?" if outlook.steps is None else str(outlook.steps),
            record.get("status", "to run"),
            run_id(config),
        )
    console.print(table)
    for config, outlook in outlooks.values():
        _describe(console, config, outlook)


def foresee(config: Config) -> Outlook:
    """Work out target layers, parameters, steps and memory from configs and skeletons."""
    require_plain_launcher(config)
    base = find_base(config.model, planning=True, task=TASKS[config.dataset.name])
    adapter, shapes = plan_adapter(config, base)
    choose_layers(config.diagnostics.layers, list(shapes))
    task = make_task(config.dataset)
    require_consent(config, task)
    origin = task.origin()
    if origin.kind == "local" and not origin.available_offline:
        raise InputError(f"dataset.path={origin.location}: there is no such file or folder.")
    rows, steps = (config.dataset.train_rows, None) if config.trains else (None, 0)
    if origin.available_offline and base.available_offline:
        plan = make_plan(config)
        if plan.schedule is not None:
            rows, steps = len(plan.data.train), plan.schedule.total_steps
    elif rows is not None:
        steps = plan_steps(config.model, rows).total_steps
    model = skeleton(base)
    total = sum(p.numel() for p in model.parameters())
    wrapped = model if adapter is None else get_peft_model(model, copy.deepcopy(adapter))
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    layers: dict[str, int] = {}
    for name in shapes:
        kind = name.rpartition(".")[2]
        layers[kind] = layers.get(kind, 0) + 1
    memory = estimate_memory(config, base, total, trainable)
    return Outlook(base, origin, layers, trainable, total, rows, steps, memory)


def estimate_memory(config: Config, base: Base, total: int, trainable: int) -> int:
    """Estimate the bytes of a training step.

    Frozen weights, plus 16 bytes per trained parameter (fp32 weight, gradient, two AdamW moments),
    plus activations of about ``34 x tokens x hidden`` 16-bit bytes per layer (Korthikanti et al.,
    2022, without the attention matrix, which SDPA does not keep), plus the logits twice in fp32.
    With gradient checkpointing only ``2 x tokens x hidden`` per layer and one layer's activations
    stay.
    """
    text = base.config.get_text_config()
    width = 2 if config.model.bf16 else 4
    tokens = config.model.per_device_batch_size * config.model.max_length
    per_layer = 34 * tokens * text.hidden_size * width // 2
    layers = text.num_hidden_layers * (2 if base.architecture == "seq2seq" else 1)
    activations = layers * per_layer
    if config.model.gradient_checkpointing:
        activations = layers * tokens * text.hidden_size * width + per_layer
    outputs = 0 if base.architecture == "classification" else text.vocab_size
    logits = 2 * 4 * tokens * outputs
    frozen = total if config.peft.use_peft else 0
    return frozen * width + 16 * trainable + activations + logits


def _kind(config: Config) -> str:
    """Configurations that differ only in seed, learning rate or optimiser share an outlook."""
    relevant = config.model_dump(include={"dataset", "model", "peft"}) | {
        "init": [config.init.method, config.init.rank_allocation]
    }
    relevant["dataset"].pop("seed")
    for key in ("seed", "learning_rate"):
        relevant["model"].pop(key)
    return repr(relevant)


def _describe(console: Console, config: Config, outlook: Outlook) -> None:
    def line(label: str, text: str) -> None:
        console.print(f"  {label:<12} {text}", highlight=False, soft_wrap=True)

    here = {True: "on this machine", False: "NOT on this machine: it has to be downloaded first"}
    layers = ", ".join(f"{kind} x {count}" for kind, count in sorted(outlook.layers.items()))
    console.print()
    console.print(f"{config.method} on {config.model.name}", style="bold", highlight=False)
    line("model", f"{outlook.total:,} parameters, {here[outlook.base.available_offline]}")
    line("dataset", f"{outlook.origin.location}, {here[outlook.origin.available_offline]}")
    line("targets", layers or "every weight")
    line(
        "trainable",
        f"{outlook.trainable:,} parameters, {outlook.trainable / outlook.total:.2%} of the base",
    )
    if config.init.rank_allocation == "energy":
        r = config.peft.lora_r
        line("ranks", f"1 to {LARGEST * r}, by energy, within the parameters of rank {r}")
    if outlook.rows is not None:
        exact = outlook.base.available_offline and outlook.origin.available_offline
        steps = f"{outlook.steps:,} steps of {config.model.real_batch_size} rows"
        line("training", f"{'' if exact else 'at most '}{outlook.rows:,} rows, {steps}")
    if not config.trains:
        line("training", "none: the model is evaluated as it starts")
    line("memory", f"about {outlook.memory_bytes / 1e9:.1f} GB at full length, one device")
