"""The table is recomputed from run folders alone."""

import json
import statistics
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from lora_one.reports.records import find_runs
from lora_one.reports.table import render, summarise, to_csv, to_markdown


def write_run(
    root, name, *, method, seed, accuracy=None, status="finished", gamma=None, rslora=True, **extra
):
    folder = root / name
    folder.mkdir(parents=True)
    record = {
        "status": status,
        "method": method,
        "metrics": {"accuracy": accuracy, "n": 100},
        "primary_metric": "accuracy",
        "losses": {"validation": 1.5},
        "phases": {
            "init": {"seconds": 2.0, "peak_memory_bytes": 10**9},
            "train": {"seconds": 30.0 + seed, "peak_memory_bytes": 2 * 10**9},
        },
        **extra,
    }
    (folder / "run.json").write_text(json.dumps(record))
    settings = {
        "seed": seed,
        "model": {"learning_rate": 1e-3, "seed": seed},
        "optimizer": {"name": "adamw"},
        "init": {"direction": method, "stable_gamma": gamma, "seed": seed},
        "peft": {"use_rslora": rslora},
        "output_dir": str(root),
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml")


def test_runs_that_differ_in_the_seed_are_one_row(tmp_path):
    scores = [0.5, 0.6, 0.7]
    for seed, score in enumerate(scores):
        write_run(tmp_path, f"a{seed}", method="lora", seed=seed, accuracy=score)
    results = summarise(find_runs(tmp_path))
    (row,) = results.rows
    cells = dict(zip(results.columns, row, strict=True))
    assert cells["seeds"] == "3"
    assert cells["accuracy"] == f"{statistics.mean(scores):.4f} ± {statistics.stdev(scores):.4f}"
    assert cells["train s"] == "31.0"
    assert cells["memory GB"] == "2.00"


def test_a_setting_that_varies_within_a_method_gets_a_column(tmp_path):
    write_run(tmp_path, "a", method="lora", seed=0, accuracy=0.1)
    write_run(tmp_path, "b", method="lora_one", seed=0, accuracy=0.2, gamma=16)
    assert "init.stable_gamma" not in summarise(find_runs(tmp_path)).columns
    write_run(tmp_path, "c", method="lora_one", seed=0, accuracy=0.3, gamma=64)
    results = summarise(find_runs(tmp_path))
    assert "init.stable_gamma" in results.columns
    assert len(results.rows) == 3


def test_options_that_only_one_benchmark_has_get_no_column(tmp_path):
    for name, options in (("gsm8k", {"split_seed": 0}), ("mbpp", {"timeout_seconds": 10.0})):
        write_run(tmp_path, name, method="lora", seed=0, accuracy=0.1)
        file = tmp_path / name / "config.yaml"
        settings = OmegaConf.load(file)
        settings.dataset = {"name": name, **options}
        OmegaConf.save(settings, file)
    columns = summarise(find_runs(tmp_path)).columns
    assert "dataset.name" in columns
    assert not {"dataset.split_seed", "dataset.timeout_seconds"} & set(columns)


def test_unfinished_and_torn_runs_are_listed_and_never_averaged(tmp_path):
    write_run(tmp_path, "good", method="lora", seed=0, accuracy=0.5)
    error = {"type": "NonFiniteError", "message": "step 3: the loss is nan"}
    write_run(tmp_path, "bad", method="lora", seed=1, accuracy=0.0, status="failed", error=error)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text('{"status": "fini')
    results = summarise(find_runs(tmp_path))
    assert [row[3] for row in results.rows] == ["1"]
    assert "failed: bad (NonFiniteError: step 3: the loss is nan)" in results.notes
    assert any(note.startswith("malformed: torn (run.json cannot") for note in results.notes)


@pytest.mark.parametrize("message", ["", "[/gloo/pair.cc:534] closed", "[enforce fail] no memory"])
def test_any_error_text_can_be_shown(tmp_path, capsys, message):
    error = {"type": "RuntimeError", "message": message}
    write_run(tmp_path, "bad", method="lora", seed=1, status="failed", error=error)
    render(summarise(find_runs(tmp_path)))
    assert f"failed: bad (RuntimeError{': ' * bool(message)}{message})" in capsys.readouterr().out


def test_a_narrow_terminal_does_not_cut_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    for seed in (0, 1):
        write_run(tmp_path, f"a{seed}", method="lora", seed=seed, accuracy=0.25)
    render(summarise(find_runs(tmp_path)))
    assert "0.2500 ± 0.0000" in capsys.readouterr().out


def test_another_scaling_of_one_method_is_seen(tmp_path):
    write_run(tmp_path, "a", method="lora", seed=0, accuracy=0.1, rslora=False)
    write_run(tmp_path, "b", method="lora_one", seed=0, accuracy=0.2, rslora=True)
    assert "peft.use_rslora" in summarise(find_runs(tmp_path)).columns


def test_a_start_from_the_cache_counts_with_what_it_cost(tmp_path):
    write_run(
        tmp_path, "a", method="lora", seed=0, accuracy=0.1, init={"seconds": 9.0, "cached": True}
    )
    results = summarise(find_runs(tmp_path))
    assert dict(zip(results.columns, results.rows[0], strict=True))["init s"] == "9.0"


def test_markdown_and_csv_hold_the_same_cells(tmp_path):
    write_run(tmp_path, "a", method="lora", seed=0, accuracy=0.5)
    results = summarise(find_runs(tmp_path))
    markdown = to_markdown(results).splitlines()
    assert markdown[2] == f"| {' | '.join(results.rows[0])} |"
    assert to_csv(results).splitlines()[1] == ",".join(results.rows[0])


def test_the_command_prints_the_table_or_says_that_there_is_none(tmp_path):
    command = [sys.executable, "-m", "lora_one.reports", str(tmp_path)]
    empty = subprocess.run(command, capture_output=True, text=True, check=False)
    assert empty.returncode == 2
    assert "no run folder" in empty.stderr
    write_run(tmp_path, "a", method="lora", seed=0, accuracy=0.5)
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0
    assert "0.5000" in answer.stdout
