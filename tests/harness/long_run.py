"""A run of ten steps with everything in it that a resumed run could get wrong."""

import json
from pathlib import Path

from lora_one.harness.records.folder import run_id

# Two epochs of five steps of two micro-batches, the last of an epoch shorter. Losses are logged
# every three steps and validated every two or three, so that no checkpoint meets all borders.
TEN_STEPS = [
    "dataset.train_rows=18",
    "dataset.validation_rows=2",
    "dataset.test_rows=2",
    "model.per_device_batch_size=2",
    "model.real_batch_size=4",
    "model.epochs=2",
    "model.max_steps=null",
    "model.logging_steps=3",
    "model.eval_epochs=0.5",
    "model.learning_rate=1e-2",
    "model.warmup_steps=2",
    "model.schedule=cosine",
    "peft.lora_dropout=0.2",
    "checkpoints.every_steps=1",
    "checkpoints.every_seconds=null",
]


def folder_of(config) -> Path:
    return Path(config.output_dir) / run_id(config)


def result_of(folder: Path) -> dict[str, bytes]:
    """What must be the same: every weight that is exported, and every line."""
    weights = sorted([*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")])
    assert weights
    files = [*weights, folder / "metrics.jsonl", folder / "init.json"]
    result = {file.name: file.read_bytes() for file in files}
    # The seconds of an initialisation that was not done again, and whether it came from the cache.
    report = json.loads(result.pop("init.json"))
    return result | {"layers": json.dumps(report.get("layers")).encode()}


def overrides_of(llama_folder, rows_folder, output_dir, *more: str) -> list[str]:
    return [
        f"model.name={llama_folder}",
        f"dataset.path={rows_folder}",
        f"output_dir={output_dir}",
        "dataset.max_new_tokens=4",
        "peft.lora_r=4",
        "evaluation.batch_size=8",
        *TEN_STEPS,
        *more,
    ]


def attempts_of(place: Path) -> list[dict]:
    files = place.glob("*/run.json")
    return [attempt for file in files for attempt in json.loads(file.read_text())["attempts"]]
