"""A run that is killed and started again ends where one that nobody killed ends, bit for bit."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from forks import Forks

from lora_one.harness import record as records
from lora_one.harness.folder import run_id

ROOT = Path(__file__).parents[2]
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


class Killed(BaseException):
    """Ends a run as abruptly as an exception can."""


@pytest.fixture
def stop_after(monkeypatch):
    """Have the next run end once the checkpoint of a step is written."""

    last: list[int] = []
    original = records.checkpoints.write_checkpoint

    def write(folder, step, *args, **options):
        result = original(folder, step, *args, **options)
        if step in last:
            raise Killed
        return result

    def arrange(*steps: int) -> None:
        last[:] = steps

    monkeypatch.setattr(records.checkpoints, "write_checkpoint", write)
    return arrange


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


VARIANTS = {
    "lora_one": ["model.gradient_checkpointing=true"],
    "offset and preconditioner": ["init=lora_ga", "optimizer=preconditioned_adamw"],
    "dora and pissa": ["peft=dora", "init=pissa"],
    "full fine-tuning": ["peft=full_ft", "init=lora"],
    "adalora": ["peft=adalora", "init=lora"],
    "loraplus, embeddings": ["peft=all_w_emb", "optimizer=loraplus"],
    "lorafa": ["optimizer=lorafa", "init=lora"],
    "bfloat16": ["model.bf16=true", "init.dtype=bf16"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_are_the_same_in_one_go_and_in_parts(small, run, stop_after, variant, capsys):
    whole = small(*TEN_STEPS, *VARIANTS[variant], "output_dir=" + small().output_dir + "/whole")
    run(whole)
    parts = small(*TEN_STEPS, *VARIANTS[variant])
    capsys.readouterr()
    # Inside an epoch and a logging interval; at the border of two epochs; with nothing left.
    stops = (4, 5, 10) if variant == "lora_one" else (4, 5)
    for step in stops:
        stop_after(step)
        with pytest.raises(Killed):
            run(parts)
    stop_after()
    record = run(parts)

    assert result_of(folder_of(parts)) == result_of(folder_of(whole))
    assert [attempt["from_step"] for attempt in record["attempts"]] == [0, *stops]
    said = capsys.readouterr().out
    assert [said.count(f"resuming from step {step}\n") for step in stops] == [1] * len(stops)
    assert not (folder_of(parts) / "checkpoints").exists()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


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


CHAINS = {
    "lora_one": ["optimizer=preconditioned_adamw"],
    "offset": ["init=pissa", "checkpoints.keep=1"],
    "adalora": ["peft=adalora", "init=lora"],
}
KILLS = {"lora_one": 10, "offset": 5, "adalora": 5}


@pytest.mark.parametrize("chain", CHAINS)
def test_twenty_kills_change_nothing(forks, llama_folder, rows_folder, tmp_path, chain):
    """SIGKILL at random moments of a run, every third one while a checkpoint is being written.

    A run that gets to its end in between is compared too, and the next one begins.
    """
    moment = random.Random(len(chain))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    child = forks.start(*overrides_of(llama_folder, rows_folder, whole, *CHAINS[chain]))
    began = time.monotonic()
    assert child.wait() == 0, child.said
    seconds = time.monotonic() - began
    (expected,) = whole.glob("arithmetic-*")
    command = overrides_of(llama_folder, rows_folder, parts, *CHAINS[chain])
    kills, torn, phases = 0, 0, set()
    while True:
        child = forks.start(*command, "preemption.max_attempts=20")
        if kills < KILLS[chain]:
            if kills % 3 == 2:
                wait_for_partial(child, parts, moment.randrange(4))
            else:
                time.sleep(moment.uniform(0.05, 0.8) * seconds)
            child.kill()
        status = child.wait()
        if status == -signal.SIGKILL:
            kills += 1
            torn += bool(list(parts.glob("*/checkpoints/.step-*")))
            phases |= {attempt["phase"] for attempt in attempts_of(parts)}
            continue
        assert status == 0, child.said
        (left,) = parts.glob("arithmetic-*")
        assert result_of(left) == result_of(expected)
        if kills == KILLS[chain]:
            break
        shutil.rmtree(parts)
    assert torn > 0
    assert "train" in phases


def attempts_of(place: Path) -> list[dict]:
    files = place.glob("*/run.json")
    return [attempt for file in files for attempt in json.loads(file.read_text())["attempts"]]


def wait_for_partial(child, place: Path, skip: int) -> None:
    """Return while a checkpoint is being written, not the first one."""
    last = None
    while child.running():
        partial = next(place.glob("*/checkpoints/.step-*"), None)
        if partial is not None and partial != last:
            last, skip = partial, skip - 1
            if skip < 0:
                return
