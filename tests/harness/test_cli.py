"""The real command line, in a process of its own."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401 -- this process has it

from lora_one.harness.imports import kept

ROOT = Path(__file__).parents[2]


def call(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "run_exp.py"), *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def small_overrides(llama_folder, rows_folder, tmp_path):
    return [
        f"model.name={llama_folder}",
        f"dataset.path={rows_folder}",
        f"output_dir={tmp_path / 'results'}",
        "dataset.max_new_tokens=4",
        "dataset.train_rows=16",
        "model.max_steps=2",
        "peft.lora_r=4",
    ]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--cfg", "job"], ["initt=lora"], ["--cfg", "job", "-m", "init.direction=PiSSA"]],
)
def test_quick_answers_do_not_import_torch(arguments):
    command = [sys.executable, "-X", "importtime", str(ROOT / "run_exp.py"), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "transformers", "peft", "datasets", "numpy"}


def test_help_lists_every_choice():
    answer = call("--help", "-m", "seed=0,1", "init=lora_two")
    assert answer.returncode == 0
    assert "init: corda, default, eva, gaussian, gradient, kaiming, lora, lora_ga" in answer.stdout


def test_cfg_job_shows_the_method_that_would_run():
    answer = call("--cfg", "job", "init=svd", "++init.direction=LoRA-One")
    assert answer.returncode == 0
    assert "direction: LoRA-One" in answer.stdout
    assert "note: init=svd gives way to ++init.direction=LoRA-One" in answer.stderr


@pytest.mark.parametrize("flags", [[], ["-m"], ["--cfg", "job"]])
def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(tmp_path, flags):
    answer = call(*flags, "model.learning_rat=1", cwd=tmp_path)
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith("error: model.learning_rat: nothing reads this key. Did you")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run"], "--run: no such flag here"),
        (["--shell-completion"], "Say what: install=bash"),
        (["--package", "model"], "--package says how --cfg shows the configuration"),
        (["--cfg", "job", "-p", "modl"], "package 'modl' not found in config"),
        (["init=lora_two", "-m", "seed=0,1"], "Did you mean 'lora_one'?"),
        (["--config-dir", "x"], "--config-dir: no such flag here"),
        (["hydra.sweep.dir=x"], "its own settings have no effect"),
        (["--cfg", "job", "init=lora,pissa"], "Add -m to run every value"),
        (["dataset.path=nowhere", "dry_run=true"], "nowhere: there is no such file or folder"),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path, arguments, message):
    answer = call(*arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_published_command_needs_no_network(tmp_path):
    arguments = [
        *["++dataset_name=meta_math", "+init=gradient", "++peft.lora_r=8", "+peft=all"],
        *["wandb.name=enter-name-here", "++init.weight=stable", "peft.use_rslora=True"],
        *["peft.lora_alpha=16", "++init.stable_gamma=64", "model.learning_rate=2e-5", "++seed=0"],
        *["++init.direction=LoRA-One", "dry_run=true"],
    ]
    answer = call("-m", *arguments, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "lora_one on meta-llama/Llama-2-7b-hf" in answer.stdout
    assert "6,738,415,616 parameters" in answer.stdout
    assert "19,988,480 parameters" in answer.stdout
    assert "3,125 steps of 32 rows" in answer.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_sweep_isolates_its_points_skips_finished_ones_and_shows_one_table(
    small_overrides, tmp_path
):
    sweep = ["-m", *small_overrides, "model.learning_rate=1e-3,1e30"]
    sweep += ["model.epochs=4", "model.max_steps=4"]
    first = call(*sweep)
    assert first.returncode == 1  # one point diverges, the other finishes
    assert first.stdout.count("done: accuracy") == 1
    assert first.stdout.count("not in the table: failed") == 1
    header = next(line for line in first.stdout.splitlines() if line.startswith("method"))
    for column in ("optimiser", "lr", "seeds", "accuracy", "init s", "train s", "memory GB"):
        assert column in header
    tables = list((tmp_path / "results" / "sweeps").iterdir())
    assert {file.suffix for file in tables} == {".md", ".csv", ".json"}

    again = call(*sweep)
    assert again.stdout.count("already done") == 1
    records = [json.loads(f.read_text()) for f in (tmp_path / "results").glob("*/run.json")]
    assert sorted(record["status"] for record in records) == ["failed", "finished"]


@pytest.mark.slow
def test_a_sweep_with_one_bad_point_runs_nothing(small_overrides, tmp_path):
    answer = call("-m", *small_overrides, "init=lora,lora_two")
    assert answer.returncode == 2
    assert "Did you mean 'lora_one'?" in answer.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_bad_data_is_status_2_from_the_command_line(small_overrides, tmp_path):
    answer = call(*small_overrides, "model.max_length=5")
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: all ")
    assert not (tmp_path / "results").exists()


def test_a_process_keeps_its_imports_out_of_collections_unless_it_had_torch_before():
    code = "import gc; from lora_one.harness.imports import kept\nwith kept():\n    import json\n"
    code += "print(gc.isenabled(), gc.get_freeze_count() > 0)"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "True True\n"
    before = gc.get_freeze_count()
    with kept():
        pass
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, before)
