"""Which folder a run has, what is in it, and how files get there; imports no torch."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection
from functools import reduce
from pathlib import Path
from typing import Any

from lora_one.harness.config.given_adapter import read_adapter
from lora_one.harness.config.schema import Config
from lora_one.harness.config.task_options import parameters, path_options
from lora_one.harness.records.source import ROOT, origin

# What changes where a run is kept or shown, or how fast it is, not what it computes.
NOT_PART_OF_THE_RUN = {
    "output_dir",
    "dry_run",
    "verbose",
    "tracking",
    "wandb",
    "launcher",
    "comparison",
    "checkpoints",
    "preemption",
    "diagnostics",
    "parallelism",
    "evaluation.batch_size",
    "evaluation.allow_code_execution",
}
# What a run without training does not read, and what one with an adapter that is there already.
FOR_TRAINING = {"optimizer"} | {
    f"model.{key}"
    for key in (
        "epochs",
        "max_steps",
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "schedule",
        "warmup_steps",
        "per_device_batch_size",
        "real_batch_size",
        "gradient_checkpointing",
        "logging_steps",
        "eval_epochs",
    )
}
# Keys that came after runs had been made, with the value at which they change nothing: there they
# count for nothing, so that these runs are found again.
NEUTRAL = {"evaluation.metric": "task", "init.rank_allocation": "uniform"}
FOR_A_START = {"train", "init", "peft", "export"}
# What chooses and encodes training and validation rows.
FOR_ROWS_THAT_CARRY_LOSS = ("train_rows", "validation_rows", "loss_on", "seed")


def run_id(config: Config) -> str:
    """Name the run: what a reader wants to tell apart, then a hash of everything that counts.

    The same configuration always has the same name, whatever the time or the job, so that the
    same command finds its run again.
    """
    rank = f"r{config.peft.lora_r}" if config.peft.use_peft else "full"
    if config.init.rank_allocation != "uniform":
        rank += f"_{config.init.rank_allocation}"
    how = [rank, config.optimizer.name, f"lr{config.model.learning_rate:g}"]
    seed: int | None = config.seed
    if config.evaluate.adapter is not None:
        # Only drawn replies have a seed, and the others none.
        how, seed = [], config.evaluation.seed
    elif not config.trains:
        how = [rank, "none"]
    names = [config.dataset.name, _model_slug(config.model.name), config.method]
    digest = settings_digest(config)[:8]
    return "-".join([*names, *how, *([] if seed is None else [f"s{seed}"]), digest])


def settings_digest(config: Config) -> str:
    """Return the SHA-256 of all settings that change what the run computes."""
    settings = config.model_dump()
    # The same folder by another relative path is the same folder, another one is not.
    paths = [("dataset", key) for key in path_options(config.dataset.name)]
    for section, key in [("model", "name"), ("evaluate", "adapter"), *paths]:
        given = settings[section].get(key)
        if isinstance(given, str) and Path(given).exists():
            settings[section][key] = str(Path(given).resolve())
    name = config.model.name
    if not Path(name).exists() and (ROOT / name).is_dir():
        # The embedded model from another working directory, or a job's copy of it.
        settings["model"]["name"] = str((origin() / name).resolve())
    neutral = {
        key for key, value in NEUTRAL.items() if reduce(getattr, key.split("."), config) == value
    }
    settings = without(settings, NOT_PART_OF_THE_RUN | neutral | unread(config))
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def unread(config: Config) -> set[str]:
    """Return the settings that have no effect on what the run computes, as ``section.key``."""
    if config.trains:
        return set()
    keys = set(FOR_TRAINING)
    if config.evaluate.adapter is not None:
        # The run's seed is only what the other seeds follow.
        keys |= FOR_A_START | {"seed"}
    if not config.learns:
        keys.add("model.max_length")
        # A benchmark that is told of them may choose its test rows by them.
        told = parameters(config.dataset.name)
        keys |= {f"dataset.{key}" for key in FOR_ROWS_THAT_CARRY_LOSS if key not in told}
        if config.model.type != "SequenceClassification":
            # A head that neither checkpoint nor adapter holds starts at random.
            keys.add("model.seed")
    return keys


def without(settings: dict[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    """Return nested settings without some keys, written ``section`` or ``section.key``."""
    return {
        key: without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in settings.items()
        if f"{prefix}{key}" not in keys
    }


def _model_slug(name: str) -> str:
    """``meta-llama/Llama-2-7b-hf`` -> ``Llama_2_7b_hf``; a folder called ``hf`` says whose."""
    path = Path(name).resolve() if Path(name).exists() else Path(name)
    parts = [part for part in path.parts if part not in ("/", "..", ".")] or ["model"]
    last = parts[-1] if len(parts[-1]) > 3 or len(parts) == 1 else "_".join(parts[-2:])
    return "".join(c if c.isalnum() or c == "." else "_" for c in last)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the folder's ``run.json``, or None where there is none that can be read."""
    try:
        return json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def finished_record(config: Config) -> dict[str, Any] | None:
    """Return the record of an earlier, finished run of the same configuration.

    A run that evaluated an adapter which has been replaced since is none.
    """
    record = read_record(Path(config.output_dir) / run_id(config))
    if record is None or record.get("status") != "finished":
        return None
    if config.evaluate.adapter is not None:
        known = (record.get("adapter") or {}).get("sha256")
        return record if known == read_adapter(config.evaluate.adapter).sha256 else None
    return record


def other_diagnostics(config: Config, record: dict[str, Any]) -> str | None:
    """Say that a finished run has not logged the diagnostics that are asked for now, if so."""
    asked = config.diagnostics
    logged = (record.get("diagnostics") or {}).get("settings")
    if asked.layers is None or logged == asked.model_dump():
        return None
    return (
        f"without the diagnostics asked for ({'others' if logged else 'none'} were logged); remove "
        "its folder to run it again with them"
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a file, in UTF-8, so that it is there either whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def publish(partial: Path, final: Path) -> None:
    """Give a complete folder its final name, once all of it is on the disk.

    An older folder of that name goes. Both names are in the same folder.
    """
    for entry in (*partial.rglob("*"), partial):
        sync(entry)
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot do it for a folder, which needs no more there.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
