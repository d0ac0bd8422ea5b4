"""``python -m lora_one.reports status`` on folders of every kind."""

import json
import subprocess
import sys

import pytest

from lora_one.harness.records.lease import Holder, lease_folder
from lora_one.reports.__main__ import main
from lora_one.reports.status import survey

FOREIGN = {"host": "gpu07", "pid": 99, "job": "4711", "machine": "gpu07 boot"}


@pytest.fixture
def results(tmp_path):
    def record(name, status, **facts):
        (tmp_path / name).mkdir()
        process = {"host": "gpu07", "pid": 12}
        content = {"status": status, "process": process, "started": "2026-01-01T00:00:00+00:00"}
        (tmp_path / name / "run.json").write_text(json.dumps(content | facts))

    def lease(name, **changes):
        folder = lease_folder(tmp_path, name)
        folder.mkdir(parents=True)
        holder = Holder.here().model_copy(update=changes)
        (folder / "3").write_text(json.dumps({"holder": holder.model_dump()}))
        (folder / f"{holder.token}.beat").write_text("5")
        return folder

    record("finished", "finished")
    record("training", "running")
    steps = [json.dumps({"step": step, "loss": 1.0}) for step in range(3)]
    (tmp_path / "training" / "metrics.jsonl").write_text("\n".join([*steps, '{"step": 3, "lo']))
    lease("training", **FOREIGN)
    lease("starting", **FOREIGN)
    record("killed", "running")
    lease("killed", started="1")
    record("silent", "running")
    lease("silent", **FOREIGN, expiry=1e-9)
    record("abandoned", "running")
    record("preempted", "preempted", preempted={"reason": "SIGUSR1", "phase": "train"})
    error = {"type": "NonFiniteError", "message": "step 3: loss nan\nmore", "phase": "train"}
    record("failed", "failed", error=error)
    record("odd", "dancing")
    for name, text in (("torn", '{"status": "runn'), ("list", "[]"), ("binary", "\udcff")):
        record(name, "running")
        (tmp_path / name / "run.json").write_text(text, errors="surrogateescape")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text("seed: 0")
    folder = lease("torn_lease")
    (folder / "4").write_text("")
    lease("given_back")
    (lease_folder(tmp_path, "given_back") / "4").write_text('{"holder": null}')
    (tmp_path / "leases" / "file").write_text("")
    (tmp_path / "cache").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "sweeps").mkdir()
    points = [{"run_id": name, "overrides": []} for name in ("finished", "training", "later")]
    (tmp_path / "sweeps" / "ab.json").write_text(json.dumps({"points": points}))
    (tmp_path / "sweeps" / "cd.json").write_text('{"points": [1')
    (tmp_path / "sweeps" / "ef.json").write_text('{"points": [{"run": 1}]}')
    (tmp_path / "sweeps" / "ab.md").write_text("| method |")
    return tmp_path


def test_every_run_has_one_state(results):
    standings = {standing.run_id: standing for standing in survey(results)}
    states = {name: standing.state for name, standing in standings.items()}
    assert states == {
        "finished": "done",
        "training": "running",
        "starting": "running",
        "torn_lease": "running",
        "killed": "stale",
        "silent": "stale",
        "abandoned": "stale",
        "preempted": "preempted",
        "failed": "failed",
        "later": "to go",
        **dict.fromkeys(["odd", "torn", "list", "binary", "bare", "file"], "unreadable"),
        **dict.fromkeys(["sweeps/cd.json", "sweeps/ef.json"], "unreadable"),
    }
    assert standings["training"].where == "gpu07 process 99 job 4711"
    assert standings["training"].step == 2
    assert standings["training"].heartbeat_age < 60
    assert standings["killed"].reason == "its process has ended without a word"
    assert standings["preempted"].reason == "SIGUSR1 (in train)"
    assert standings["failed"].reason == "NonFiniteError: step 3: loss nan (in train)"
    assert standings["failed"].where == "gpu07 process 12"


def test_counts_come_first_and_the_json_says_the_same(results, capsys):
    assert main(["status", str(results)]) == 0
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first == (
        "18 runs: 1 done, 3 running, 3 stale, 1 preempted, 1 failed, 8 unreadable, 1 to go"
    )
    assert header.split()[:2] == ["state", "run"]
    assert any("NonFiniteError: step 3: loss nan" in row for row in rows)
    assert not any(row.startswith("done") for row in rows)
    assert main(["status", "--json", str(results)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"]["running"] == 3
    assert len(told["runs"]) == 18


def test_nothing_to_tell_of_is_status_2(tmp_path, capsys):
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: No such file or directory" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2
    assert "no run and no sweep in" in capsys.readouterr().err


def test_the_status_imports_no_torch(results):
    command = [sys.executable, "-X", "importtime", "-m", "lora_one.reports", "status", str(results)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0
    assert not {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()} & {"torch"}
