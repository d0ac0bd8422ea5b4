"""A run that is killed and started again ends where one that nobody killed ends, bit for bit."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_one.errors import InputError, NonFiniteError
from lora_one.harness.records import record as records
from lora_one.harness.resuming.checkpoint import find_fault, newest_valid, write_checkpoint
from lora_one.harness.training import loop

from .long_run import TEN_STEPS, attempts_of, folder_of, overrides_of, result_of

ROOT = Path(__file__).parents[2]


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


VARIANTS = {
    "lora_one": ["model.gradient_checkpointing=true", "peft=all_w_emb"],
    "offset and preconditioner": [
        "init=lora_ga",
        "optimizer=preconditioned_adamw",
        "diagnostics.layers=3",
        "diagnostics.every_steps=2",
    ],
    "dora and pissa": ["peft=dora", "init=pissa"],
    "full fine-tuning": ["peft=full_ft", "init=lora"],
    "adalora": ["peft=adalora", "init=lora"],
    "ranks by energy": ["init.rank_allocation=energy", "init=lora_ga", "optimizer=lorafa"],
    "lorafa": ["optimizer=lorafa", "init=lora"],
    "bfloat16 and loraplus": ["model.bf16=true", "init.dtype=bf16", "optimizer=loraplus"],
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


def wait_for_partial(child, place: Path, skip: int) -> None:
    """Return while a checkpoint is being written, not the first one."""
    last = None
    while child.running():
        partial = next(place.glob("*/checkpoints/.step-*"), None)
        if partial is not None and partial != last:
            last, skip = partial, skip - 1
            if skip < 0:
                return


@pytest.mark.slow
def test_a_kill_of_the_real_command_line(llama_folder, rows_folder, tmp_path, forks):
    whole = forks.start(*overrides_of(llama_folder, rows_folder, tmp_path / "whole"))
    parts = overrides_of(llama_folder, rows_folder, tmp_path / "parts")
    command = [sys.executable, str(ROOT / "run_exp.py"), *parts]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        while not list((tmp_path / "parts").glob("*/checkpoints/step-4")):
            assert first.poll() is None
            time.sleep(0.002)
        first.kill()
    assert forks.start(*parts).wait() == whole.wait() == 0
    (left,), (expected,) = ((tmp_path / place).glob("arithmetic-*") for place in ("parts", "whole"))
    assert result_of(left) == result_of(expected)
    first, second = attempts_of(tmp_path / "parts")
    assert (first["status"], second["status"]) == ("killed", "finished")
    assert second["from_step"] in (4, 5, 6)


def keep_three_steps(folder: Path) -> Path:
    """Write three checkpoints by hand, in a run folder with eight bytes of metrics."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("12345678")
    for step in (1, 2, 3):
        write_checkpoint(
            folder,
            step,
            lambda place: (place / "file").write_bytes(b"0123456789"),
            lengths={"metrics.jsonl": 2 * step},
            keep=2,
        )
    return folder / "checkpoints"


def cut(file: Path) -> None:
    os.truncate(file, 3)


def flip(file: Path) -> None:
    file.write_bytes(b"9123456789")


def shorten_metrics(file: Path) -> None:
    os.truncate(file.parents[2] / "metrics.jsonl", 5)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (cut, "file has 3 bytes, expected 10"),
        (flip, "file does not have its SHA-256 sum"),
        (Path.unlink, "file cannot be read: No such file or directory"),
        (lambda file: (file.parent / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda file: cut(file.parent / "manifest.json"), "manifest.json is damaged"),
        (shorten_metrics, "metrics.jsonl of the run has 5 bytes, and had 6 when it was written"),
    ],
)
def test_a_spoilt_checkpoint_is_skipped_with_one_line(tmp_path, spoil, why):
    root = keep_three_steps(tmp_path / "run")
    assert sorted(path.name for path in root.iterdir()) == ["step-2", "step-3"]
    said: list[str] = []
    assert newest_valid(tmp_path / "run", said.append).step == 3
    assert said == []
    spoil(root / "step-3" / "file")
    assert newest_valid(tmp_path / "run", said.append).step == 2
    assert len(said) == 1
    assert said[0].startswith(f"note: checkpoint step-3 is skipped: {why}")


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(tmp_path):
    def fail(place: Path) -> None:
        (place / "file").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    root = keep_three_steps(tmp_path / "run")
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path / "run", 4, fail, lengths={}, keep=2)
    assert sorted(path.name for path in root.iterdir()) == ["step-2", "step-3"]
    assert find_fault(newest_valid(tmp_path / "run", print)) is None


def stopped_run(small, run, stop_after, *overrides: str):
    config = small(*TEN_STEPS, *overrides)
    stop_after(4)
    with pytest.raises(Killed):
        run(config)
    stop_after()
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_spoilt_newest_checkpoint_costs_its_steps_and_nothing_else(
    small, run, stop_after, capsys
):
    whole = small(*TEN_STEPS, "output_dir=" + small().output_dir + "/whole")
    run(whole)
    config = stopped_run(small, run, stop_after)
    cut(folder_of(config) / "checkpoints" / "step-4" / "optimizer.safetensors")
    capsys.readouterr()
    run(config)
    said = capsys.readouterr().out
    assert "note: checkpoint step-4 is skipped: optimizer.safetensors has 3 bytes" in said
    assert "resuming from step 3\n" in said
    assert result_of(folder_of(config)) == result_of(folder_of(whole))


def test_what_does_not_belong_to_the_run_is_refused_and_nothing_is_overwritten(
    small, run, stop_after, copy_of, rows_folder, llama_folder, monkeypatch
):
    config = stopped_run(small, run, stop_after, f"dataset.path={copy_of(rows_folder)}")
    folder = folder_of(config)
    before = contents(folder)

    def refuses(other, message: str) -> None:
        with pytest.raises(InputError, match=message):
            run(other)
        assert contents(folder) == before

    foreign = small(*TEN_STEPS, f"dataset.path={config.dataset.path}", "model.weight_decay=0.5")
    shutil.copytree(folder, folder_of(foreign))
    refuses(foreign, "was written under another configuration. Put back what it was, or remove")

    train = Path(config.dataset.path) / "train.jsonl"
    rows = train.read_text()
    train.write_text(rows.replace("1", "2"))
    refuses(config, "was written with other train rows: the dataset has changed")
    train.write_text(rows)

    diagnosed = small(*TEN_STEPS, f"dataset.path={config.dataset.path}", "diagnostics.layers=1")
    refuses(diagnosed, "was written with diagnostics=None, and these are .*'layers': 1")

    fingerprint = "lora_one.harness.stages.weights_fingerprint"
    monkeypatch.setattr(fingerprint, lambda _: "sha256:other")
    refuses(config, "was written with base weights sha256:.*, and these are sha256:other")
    monkeypatch.undo()

    monkeypatch.setattr("lora_one.harness.resuming.resume.world_size", lambda: 2)
    refuses(config, "was written by 1 ranks, and these are 2")


def test_other_versions_are_a_warning(small, run, stop_after, capsys, monkeypatch):
    config = stopped_run(small, run, stop_after)
    monkeypatch.setattr("lora_one.harness.resuming.resume.version", lambda _: "0.1")
    assert run(config)["status"] == "finished"
    said = capsys.readouterr().out
    assert "warning: step-4 was written with torch 2." in said
    assert ", this is 0.1; the run goes on, perhaps not bit for bit" in said


def test_a_loss_that_is_no_number_after_a_resume_still_fails_the_run(
    small, run, stop_after, monkeypatch
):
    config = stopped_run(small, run, stop_after)
    loss = loop.token_loss_sum
    monkeypatch.setattr(loop, "token_loss_sum", lambda *given: loss(*given) * math.nan)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"step 5: loss nan"):
            run(config)
    record = json.loads((folder_of(config) / "run.json").read_text())
    assert (record["status"], record["error"]["phase"]) == ("failed", "train")
    assert [attempt["status"] for attempt in record["attempts"]] == ["failed"] * 3


def test_attempts_without_progress_end(small, run, monkeypatch):
    def die(*_, **__):
        raise Killed

    monkeypatch.setattr("lora_one.harness.stages.loop.train", die)
    config = small("preemption.max_attempts=2")
    for _ in range(3):  # the first one got farther than nothing
        with pytest.raises(Killed):
            run(config)
    with pytest.raises(InputError, match=r"2 attempts in a row made no progress.*phase train.*=4"):
        run(config)
    with pytest.raises(Killed):
        run(small("preemption.max_attempts=4"))


FULL_DISK = """
set -e
mount -t tmpfs -o size=$1 tmpfs $2
shift
place=$1
shift
set +e
"$@"
echo "status $?"
find $place -name '.*' ; cat $place/*/run.json ; ls $place/*/checkpoints
"""


def test_a_full_disk_fails_the_run_and_spares_older_checkpoints(
    llama_folder, rows_folder, tmp_path
):
    """A real one: a small tmpfs of a mount namespace, which fills up after some checkpoints."""
    place = tmp_path / "results"
    place.mkdir()
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace here")
    program = [sys.executable, str(ROOT / "run_exp.py")]
    # All ten checkpoints stay, and with what else there is they need more than twice the space.
    command = overrides_of(llama_folder, rows_folder, place, "checkpoints.keep=100")
    answer = subprocess.run(
        ["unshare", "-rm", "bash", "-c", FULL_DISK, "bash", "700k", place, *program, *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "status 1\n" in answer.stdout, answer.stdout + answer.stderr
    assert "failed: " in answer.stderr
    assert "No space left on device" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert '"status": "failed"' in answer.stdout
    assert "step-1\n" in answer.stdout
    assert ".partial" not in answer.stdout
