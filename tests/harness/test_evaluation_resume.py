"""An evaluation that was stopped goes on: no reply is lost, and none is made twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lora_one.evaluation.engines import TransformersEngine
from lora_one.tasks.arithmetic import Arithmetic

from .evaluated import predictions, untimed
from .long_run import folder_of

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """What a kill looks like to code that is being killed: nothing catches it."""


def _kill_after(monkeypatch, batches: int):
    original = Arithmetic.judge
    judged = []

    def judge(self, replies, examples):
        if len(judged) == batches:
            raise Killed
        judged.extend(example.row_id for example in examples[:1])
        return original(self, replies, examples)

    monkeypatch.setattr(Arithmetic, "judge", judge)
    return lambda: monkeypatch.setattr(Arithmetic, "judge", original)


@pytest.fixture
def count_prompts(monkeypatch):
    """Notes which rows are generated."""
    asked = []
    original = TransformersEngine.reply

    def reply(self, examples, *rest):
        asked.append([example.row_id for example in examples])
        return original(self, examples, *rest)

    monkeypatch.setattr(TransformersEngine, "reply", reply)
    return asked


EVALUATIONS = {
    "one step": ["train=none"],
    "trained": [],
    "samples": ["train=none", "evaluation.samples=2", "evaluation.temperature=0.8"],
}


@pytest.mark.parametrize("overrides", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_a_killed_evaluation_goes_on_where_it_stopped(
    small, run, monkeypatch, count_prompts, capsys, tmp_path, overrides
):
    whole = small(*overrides, f"output_dir={tmp_path / 'whole'}")
    expected = run(whole)
    rows = predictions(folder_of(whole))

    config = small(*overrides, "evaluation.batch_size=2")
    revive = _kill_after(monkeypatch, 2)
    with pytest.raises(Killed):
        run(config)
    revive()
    (part,) = folder_of(config).glob("predictions.jsonl.part-*")
    kept = [json.loads(line)["row_id"] for line in part.read_text().splitlines()[1:]]
    assert len(kept) == 4
    part.write_text(part.read_text() + '{"row_id": "te')  # the batch that was being written

    count_prompts.clear()
    capsys.readouterr()
    resumed = run(config)
    assert len(count_prompts[0]) == len(rows) - 4
    said = capsys.readouterr().out
    assert f"eval: 4 of {len(rows)} replies are there already" in said
    assert "line 6 is torn; 1 line(s) are made again" in said
    assert predictions(folder_of(config)) == rows
    assert untimed(resumed["metrics"]) == untimed(expected["metrics"])
    assert not list(folder_of(config).glob("*.part*"))


def test_replies_of_other_weights_are_made_again(
    small, run, monkeypatch, count_prompts, capsys, copy_of, llama_folder
):
    base = copy_of(llama_folder)
    config = small("train=none", "init=lora", f"model.name={base}", "evaluation.batch_size=2")
    revive = _kill_after(monkeypatch, 2)
    with pytest.raises(Killed):
        run(config)
    revive()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data.mul_(1.5)
    model.save_pretrained(base)
    count_prompts.clear()
    assert run(config)["metrics"]["n"] == len(count_prompts[0]) == 6
    assert (
        "holds 4 replies of other weights or settings; they are not used" in capsys.readouterr().out
    )


def test_replies_found_again_are_judged_by_the_present_scorer(
    small, run, monkeypatch, count_prompts
):
    config = small("train=none", "init=lora", "evaluation.batch_size=2")
    revive = _kill_after(monkeypatch, 2)
    with pytest.raises(Killed):
        run(config)
    revive()
    repaired = {"parsed": "1", "correct": True}
    names = Arithmetic.scorers
    monkeypatch.setattr(Arithmetic, "score", lambda *_: dict.fromkeys(names, repaired))
    count_prompts.clear()
    assert run(config)["metrics"]["accuracy"] == 1.0
    assert len(count_prompts[0]) == 2
    assert all(
        row["scores"] == dict.fromkeys(names, repaired) for row in predictions(folder_of(config))
    )


@pytest.mark.slow
def test_a_process_that_was_killed_outright_loses_no_row_it_had_made(llama_folder, tmp_path):
    def start(place: str) -> subprocess.Popen:
        overrides = [
            "train=none",
            "init=lora",
            f"model.name={llama_folder}",
            f"output_dir={tmp_path / place}",
            "dataset.test_rows=40",
            "dataset.max_new_tokens=32",
            "peft.lora_r=4",
            "evaluation.batch_size=1",
        ]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run_exp.py"), *overrides],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )

    def finish(process: subprocess.Popen) -> str:
        said, _ = process.communicate()
        assert process.returncode == 0
        return said

    def count_made() -> int:
        """Rows that are whole, beside the line of the fingerprint."""
        for part in (tmp_path / "killed").glob("*/predictions.jsonl.part-0"):
            try:
                return part.read_text().count("\n") - 1
            except FileNotFoundError:  # the evaluation was done between the two looks
                break
        return -1

    killed = start("killed")
    while killed.poll() is None and count_made() < 5:
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it was done before it could be killed"
    made = count_made()
    assert 5 <= made < 40
    assert f"eval: {made} of 40 replies are there already" in finish(start("killed"))
    finish(start("whole"))
    (first,), (second,) = ((tmp_path / p).glob("arithmetic-*") for p in ("killed", "whole"))
    assert predictions(first) == predictions(second)


@pytest.mark.slow
def test_two_ranks_score_every_row_once_and_go_on_where_they_were_killed(
    llama_folder, rows_folder, tmp_path
):
    def evaluate(*launcher: str):
        place = tmp_path / f"{len(launcher)}"
        overrides = [
            "train=none",
            "init=lora",
            f"model.name={llama_folder}",
            f"dataset.path={rows_folder}",
            f"output_dir={place}",
            "dataset.max_new_tokens=6",
            "peft.lora_r=4",
            "evaluation.samples=3",
            "evaluation.temperature=0.9",
            "evaluation.batch_size=2",
        ]
        answer = subprocess.run(
            [sys.executable, *launcher, str(ROOT / "run_exp.py"), *overrides],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        (folder,) = place.glob("arithmetic-*")
        return answer.stdout, json.loads((folder / "run.json").read_text()), folder

    def both():
        return evaluate("-m", "torch.distributed.run", "--nproc-per-node=2")

    def check(record: dict, folder: Path) -> None:
        rows = predictions(folder)
        assert len({(row["row_id"], row["sample"]) for row in rows}) == len(rows) == 18
        assert rows == predictions(expected)
        assert untimed(record["metrics"]) == untimed(alone["metrics"])
        assert not list(folder.glob("*.part*"))

    _, alone, expected = evaluate()
    said, record, folder = both()
    assert said.count("done: accuracy") == 1
    check(record, folder)

    # As two ranks leave it that were killed: no final file, some rows in two parts.
    (folder / "run.json").write_text(json.dumps(record | {"status": "failed"}))
    lines = (folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.jsonl").unlink()
    header = json.dumps({"fingerprint": _fingerprint(folder)}) + "\n"
    for rank, mine in enumerate((lines[:5], lines[7:9])):
        (folder / f"predictions.jsonl.part-{rank}").write_text(header + "".join(mine))
    said, record, folder = both()
    assert "eval: 7 of 18 replies are there already" in said
    check(record, folder)


def _fingerprint(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["evaluation"]["fingerprint"]
