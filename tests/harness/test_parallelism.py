"""However the base is spread over ranks, the run is that of one process.

Tolerance: sums in another order differ by 1e-7 relative; AdamW's first steps, which are nearly
signs of the gradient, amplify that where a gradient is nearly zero, to a fraction of the rate.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lora_one.errors import InputError
from lora_one.harness.data.rows import init_batches
from lora_one.harness.distributed import parallelism
from lora_one.harness.dry_run import show_plan
from lora_one.harness.records.folder import run_id
from lora_one.tasks.encoding import Collator, EncodedRows

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
TOLERANCE = 1e-4
# Runs of the worker: what they show beside the method.
RUNS = {
    "preconditioned": ["init=lora_one", "optimizer=preconditioned_adamw", "dataset.test_rows=5"],
    "pissa": ["init=pissa", "diagnostics.layers=2", "diagnostics.every_steps=2"],
    "lora_ga": ["init=lora_ga", "init.bsz=2", "init.iters=4", "model.gradient_checkpointing=true"],
    "embeddings": ["init=lora_one", "peft=all_w_emb"],
    "t5": ["init=lora_one", "dataset.test_rows=5"],  # gathers the base for its evaluation
}


@pytest.fixture(scope="module")
def overrides(llama_folder, t5_folder, rows_folder):
    """Overrides of a run of four steps into a folder."""

    def for_run(place, *more, model=llama_folder):
        return [
            f"model.name={model}",
            f"dataset.path={rows_folder}",
            f"output_dir={place}",
            "dataset.max_new_tokens=4",
            "dataset.train_rows=32",
            "model.real_batch_size=8",
            "model.per_device_batch_size=2",
            "model.learning_rate=1e-3",
            "peft.lora_r=4",
            *more,
        ]

    return for_run


@pytest.fixture
def alone(compose, run, tmp_path, overrides):
    """Do a run in this process; return its record and adapter."""

    def do(*more, **options):
        config = compose(*overrides(tmp_path / "alone", *more, **options))
        return run(config), adapter_in(tmp_path / "alone" / run_id(config))

    return do


def torchrun(*command, **environment):
    answer = subprocess.run(
        [*TORCHRUN, *map(str, command)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    return answer.stdout


def adapter_in(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_result(record, weights, expected_record, expected):
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (weights[name] - tensor).abs().max() < TOLERANCE, name
    for loss in ("base_validation", "start_validation", "validation"):
        assert record["losses"][loss] == pytest.approx(expected_record["losses"][loss], abs=1e-4)
    assert record["evaluation"]["replies_sha256"] == expected_record["evaluation"]["replies_sha256"]


def diagnosed(folder):
    """The logged angles and norms, a dictionary for each step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = ("principal_angle_", "update_norm/")
    found = [{key: line[key] for key in line if key.startswith(kinds)} for line in lines]
    return [values for values in found if values]


@pytest.mark.slow
def test_fsdp2_from_the_command_line_ends_where_one_process_ends(overrides, alone, read, tmp_path):
    """With five test rows for two ranks, whose replies have different lengths."""
    more = ["init=lora_one", "dataset.test_rows=5"]
    expected = alone(*more)
    place = tmp_path / "fsdp2"
    said = torchrun(ROOT / "run_exp.py", *overrides(place, *more, "parallelism=fsdp2"))
    assert "2 rows x 2 accumulation x 2 ranks = 8" in said
    # How a run is spread over ranks is no part of it: both have the same name.
    (folder,) = place.glob("arithmetic-*")
    assert folder.name == expected[0]["run_id"]
    assert_same_result(read(folder, "run.json"), adapter_in(folder), *expected)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, overrides, t5_folder):
    """Do all ``RUNS`` with one pair of ranks; return the folder, and what each rank saw."""
    place = tmp_path_factory.mktemp("sharded")
    runs = []
    for name, more in RUNS.items():
        model = {"model": t5_folder} if name == "t5" else {}
        runs.append(overrides(place / name, *more, "parallelism=fsdp2", **model))
    (place / "overrides.json").write_text(json.dumps(runs))
    torchrun(Path(__file__).with_name("fsdp_worker.py"), place)
    seen = [json.loads((place / f"seen-{rank}.json").read_text()) for rank in range(2)]
    return place, [dict(zip(RUNS, one, strict=True)) for one in seen]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_fsdp2_is_one_process_for_every_method(name, sharded, alone, read, t5_folder, tmp_path):
    place, _ = sharded
    (folder,) = (place / name).glob("arithmetic-*")
    expected = alone(*RUNS[name], **({"model": t5_folder} if name == "t5" else {}))
    assert_same_result(read(folder, "run.json"), adapter_in(folder), *expected)
    sharded_log, log = map(diagnosed, (folder, tmp_path / "alone" / folder.name))
    assert len(log) == (4 if name == "pissa" else 0)  # the start, steps 1, 2 and 4
    for found, line in zip(sharded_log, log, strict=True):
        assert found == pytest.approx(line, rel=1e-3, abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_base_is_cut_in_halves_and_the_adapter_is_not(name, sharded):
    _, ranks = sharded
    for seen in (one[name] for one in ranks):
        # What is trained in full (embeddings) is not cut, nor is the original it was copied from.
        assert seen["cut"] == 1 or name == "embeddings"
        assert seen["share"] < (0.55 if name != "embeddings" else 1)
        # One message a step, of the adapter's size.
        assert seen["reduced"] == [[seen["trained"]]] * 4
    assert ranks[0][name]["adapter"] == ranks[1][name]["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["zero2", "zero3"])
def test_deepspeed_ends_where_one_process_ends(choice, overrides, alone, read, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    more = ["init=lora_ga", "dataset.test_rows=5"]
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    command = overrides(tmp_path, *more, f"parallelism={choice}")
    torchrun(ROOT / "run_exp.py", *command, **accelerator)
    (folder,) = tmp_path.glob("arithmetic-*")
    assert_same_result(read(folder, "run.json"), adapter_in(folder), *alone(*more))


REFUSED = {
    ("parallelism=fsdp2", "peft=full_ft", "init=lora"): "Give parallelism=zero2, or ddp",
    ("parallelism=zero2", "optimizer=preconditioned_adamw"): "needs lora_A and lora_B whole",
    ("parallelism=zero3", "optimizer=riemannian"): "needs lora_A and lora_B whole",
    ("parallelism=zero2", "peft=full_ft", "init=lora", "model.bf16=true"): "to bfloat16",
    ("parallelism=zero2", "peft=adalora", "init=lora"): "ranks its directions by them",
    ("parallelism=fsdp",): "expected 'ddp', 'fsdp2', 'zero2' or 'zero3'",
}


@pytest.mark.parametrize("given", REFUSED, ids=" ".join)
def test_what_cannot_be_sharded_is_refused(given, compose):
    with pytest.raises(InputError, match=REFUSED[given]):
        compose(*given)


@pytest.mark.parametrize("choice", ["fsdp2", "zero2", "zero3"])
def test_one_rank_has_nobody_to_share_with(choice, small, run):
    with pytest.raises(InputError, match="spreads a run over ranks, and there is one"):
        run(small(f"parallelism={choice}"))


def test_a_plan_may_be_looked_at_on_one_core(small, capsys):
    show_plan([small("parallelism=fsdp2", "dry_run=true")])
    assert "to run" in capsys.readouterr().out


@pytest.mark.parametrize("variable", parallelism.PLUGINS)
@pytest.mark.parametrize("choice", ["ddp", "fsdp2"])
def test_a_launcher_that_shards_by_itself_is_refused(variable, choice, small, run, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=f"the launcher asks accelerate for .*{variable}"):
        run(small(f"parallelism={choice}"))


@pytest.mark.parametrize("variable", parallelism.ARITHMETIC)
def test_a_launcher_that_asks_for_other_arithmetic_is_refused(variable, small, run, monkeypatch):
    """The Trainer would train in it, and every other stage compute as before."""
    monkeypatch.setenv(variable, "bf16" if "PRECISION" in variable else "INDUCTOR")
    for act in (run, lambda config: show_plan([config])):
        with pytest.raises(InputError, match=f"the launcher asks accelerate for .*{variable}"):
            act(small())


@pytest.mark.parametrize(
    ("choice", "ranks", "rows", "taken"),
    [("ddp", 1, 5, 5), ("ddp", 4, 9, 8), ("ddp", 16, 20, 16), ("ddp", 4, 3, 0), ("fsdp2", 2, 5, 4)],
)
def test_every_rank_has_init_rows_or_none_has(choice, ranks, rows, taken, small, monkeypatch):
    """A rank without would not take part in what the others add up."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    row = {"input_ids": [4, 5], "labels": [-100, 5]}
    data = SimpleNamespace(train=EncodedRows([row] * rows, ["a"] * rows, [], 8))
    config = small("init=pissa", f"parallelism={choice}")
    assert len(init_batches(config, data, Collator(0, "causal"))) == taken


@pytest.fixture
def two_ranks(monkeypatch):
    """Be rank 0 of two, as far as the plan of a run looks."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("lora_one.harness.distributed.peers.world_size", lambda: 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("init.bsz=2", "init.iters=3"), "init.iters=3 micro-batches cannot be shared evenly"),
        (("peft=dora", "init=lora"), "DoRA's magnitudes are norms"),
    ],
)
def test_what_all_ranks_would_wait_for_is_refused(given, message, small, run, two_ranks, tmp_path):
    with pytest.raises(InputError, match=message):
        run(small("parallelism=fsdp2", *given))
    assert not (tmp_path / "results").exists()


def test_deepspeed_that_is_not_installed(small, run, two_ranks, monkeypatch):
    monkeypatch.setattr(parallelism, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="parallelism=zero2 needs DeepSpeed"):
        run(small("parallelism=zero2"))
