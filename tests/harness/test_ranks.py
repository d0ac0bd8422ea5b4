"""Several ranks are one run: who is which, the same rows, start and steps, one writer, one end."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from lora_one.errors import InputError
from lora_one.harness.distributed.devices import check_devices, check_numbers
from lora_one.harness.distributed.ranks import connect, identify
from lora_one.harness.distributed.slurm_step import expand_counts, expand_hosts
from lora_one.harness.training.order import FilledRows, Order
from lora_one.tasks.encoding import EncodedRows

from .launching import LAUNCHERS, ROOT, srun, step

TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2"]


def identified(environment: dict[str, str]) -> dict[str, str]:
    identify(environment)
    return {name: environment[name] for name in LAUNCHERS if name in environment}


def test_tasks_of_a_step_on_one_node():
    assert identified(step(1, 2)) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(10240 + 16 * 41),
    }


def test_tasks_of_a_step_on_several_nodes():
    several = {
        "SLURM_STEP_NODELIST": "gpu[07-08,11],x1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_JOB_NODELIST": "gpu[05-11],x[1-2]",
        "SLURM_NODEID": "3",
        "SLURM_LOCALID": "0",
        "SLURM_GTIDS": "6",
        # The job's own numbers are those of all its steps.
        "SLURM_NTASKS": "14",
    }
    found = identified(step(6, 7, **several))
    assert found["MASTER_ADDR"] == "gpu07"
    assert (found["RANK"], found["WORLD_SIZE"]) == ("6", "7")
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("0", "1")


def test_who_is_identified_stays_so():
    environment = step(1, 2)
    first = identified(environment)
    # A child of this rank may be started in a step of its own, and stays a part of the rank.
    assert identified(environment | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "9"}) == first


def test_what_the_user_chose_stays():
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "12345", "WORLD_SIZE": "2"}
    assert identified(step(0, 2, **chosen)) | chosen == identified(step(0, 2, **chosen))


def test_jobs_and_steps_have_ports_of_their_own():
    ports = {
        identified(step(0, 2, SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(number)))["MASTER_PORT"]
        for job in range(4_000_000, 4_000_700)
        for number in range(16)
    }
    assert len(ports) == 700 * 16
    assert all(1024 < int(port) < 32768 for port in ports)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        # The shell of sbatch and of salloc, for whatever number of tasks.
        {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        # salloc's interactive step.
        step(0, 1, SLURM_STEP_ID=str(0xFFFFFFFA), SLURM_NTASKS="2"),
        step(0, 2, SLURM_STEP_ID=str(0xFFFFFFFA)),
        step(0, 1, SLURM_NTASKS="2"),
        # A batch script submitted from inside a step, whose variables it inherits.
        step(0, 2, SLURM_GTIDS="0"),
        step(0, 2, SLURM_JOB_NODELIST="node[8-9]"),
    ],
)
def test_one_process_waits_for_nobody(environment):
    assert set(identified(environment)) <= {"WORLD_SIZE"}


def test_the_variables_of_a_launcher_come_before_those_of_slurm():
    launched = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "29500",
    }
    assert identified(step(0, 2) | launched) == launched


@pytest.fixture
def asked(monkeypatch):
    """What accelerate is asked for when two ranks connect."""
    found = {}
    monkeypatch.setenv("ACCELERATE_BYPASS_DEVICE_MAP", "false")
    monkeypatch.setattr("lora_one.harness.distributed.peers.settle_port", lambda: None)
    monkeypatch.setattr("accelerate.PartialState", lambda **given: found.update(given))
    with monkeypatch.context() as two_ranks:
        two_ranks.setenv("WORLD_SIZE", "2")
        connect()
    return found


def test_a_rank_that_sees_its_own_gpu_alone_is_not_sent_to_another(monkeypatch, asked):
    """A task of ``srun --gpus-per-task=1`` sees its GPU as number 0, whatever its local rank is."""
    told = {}
    monkeypatch.setattr(
        torch.nn.parallel,
        "DistributedDataParallel",
        lambda model, **given: told.update(given) or model,
    )
    monkeypatch.setattr(Accelerator, "multi_device", True)
    Accelerator(cpu=True).prepare_model(torch.nn.Linear(1, 1))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert told["device_ids"] is None


def test_ranks_wait_longer_for_each_other_than_nccl_does_by_itself(asked):
    """Ten minutes are less than a base of 70 B parameters takes to come from a shared disk."""
    assert asked["timeout"] >= timedelta(hours=1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 and no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "RANK=1 and WORLD_SIZE not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x: expected a number"),
        (step(0, 2, WORLD_SIZE="4"), "WORLD_SIZE=4 contradicts SLURM_STEP_NUM_TASKS=2"),
        (step(0, 2, SLURM_STEP_TASKS_PER_NODE="3"), "TASKS_PER_NODE=3, SLURM_STEP_NUM_TASKS=2"),
        (step(0, 2, SLURM_STEP_TASKS_PER_NODE="two"), "SLURM_STEP_TASKS_PER_NODE=two"),
        (step(0, 2, SLURM_STEP_NODELIST="a,b"), "contradict each other"),
        (step(0, 2, SLURM_NODEID="1"), "SLURM_NODEID=1, SLURM_STEP_NODELIST=node7"),
        (step(2, 2), "SLURM_PROCID=2, SLURM_STEP_NUM_TASKS=2 contradict"),
        (step(1, 2, SLURM_LOCALID="2"), "SLURM_LOCALID=2, SLURM_STEP_TASKS_PER_NODE=2"),
        (step(1, 2, SLURM_LOCALID=""), "no SLURM_LOCALID"),
        (step(1, 2, SLURM_STEP_ID="x"), "SLURM_STEP_ID=x: expected a number"),
    ],
)
def test_half_an_environment_and_contradictions_are_bad_input(environment, message):
    with pytest.raises(InputError) as error:
        identify(environment)
    assert message in str(error.value)
    assert environment["RANK"].isdecimal() or "RANK=x" in message


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("node[003-005,010],x1", ["node003", "node004", "node005", "node010", "x1"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("r[1-2]c[01-02]-ib", ["r1c01-ib", "r1c02-ib", "r2c01-ib", "r2c02-ib"]),
    ],
)
def test_lists_of_hosts(text, hosts):
    assert expand_hosts(text) == hosts


def test_lists_of_counts():
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]


def test_ranks_do_not_share_a_gpu():
    alone = {"host": "a", "gpus": 1, "ranks": 2}
    check_devices([alone | {"gpu": "u0"}, alone | {"gpu": "u1"}])  # one GPU bound to each task
    with pytest.raises(InputError, match=r"ranks 0 and 1 on host a would share a GPU: 2 ranks on"):
        check_devices([alone | {"gpu": "u0"}, alone | {"gpu": "u0"}])
    with pytest.raises(InputError, match="rank 1 on host a sees 0 GPUs and rank 0 on host a sees"):
        check_devices([alone | {"gpu": "u0"}, alone | {"gpus": 0, "gpu": None}])


def test_deepspeed_needs_the_gpus_to_be_numbered_as_the_ranks_are():
    seen = {"host": "a", "gpus": 2, "gpu": "u"}
    check_numbers([seen | {"number": 0}, seen | {"number": 1}])
    check_numbers([seen | {"number": 1, "gpus": 0, "gpu": None}])  # CPUs have no number
    with pytest.raises(InputError, match="rank 1 is number 1 on host a and sees 1 GPUs"):
        check_numbers([seen | {"number": 0, "gpus": 1}, seen | {"number": 1, "gpus": 1}])


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 11, 24])
def test_every_row_is_trained_once_an_epoch_whatever_the_ranks(rows):
    """In the passes of one process, and in the order that accelerate gives it."""
    size, ranks, blank = 2, 4, rows
    order, usual = Order(rows, size * ranks, 5), SeedableRandomSampler(range(rows), data_seed=5)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        usual.set_epoch(epoch)
        batches = BatchSampler(order, size, drop_last=False)
        shards = [list(BatchSamplerShard(batches, ranks, each)) for each in range(ranks)]
        seen = [row for one in zip(*shards, strict=True) for part in one for row in part]
        assert [row for row in seen if row != blank] == list(usual)
        assert len(seen) == -(-rows // 8) * 8


def test_a_blank_row_teaches_nothing():
    rows = EncodedRows([{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}], ["a"], [], 8)
    filled = FilledRows(rows)
    assert (len(filled), filled[0]) == (1, rows[0])
    assert filled[1] == {"input_ids": [4], "labels": [-100]}


@pytest.fixture
def overrides(llama_folder, rows_folder, tmp_path):
    return [
        f"model.name={llama_folder}",
        f"dataset.path={rows_folder}",
        f"output_dir={tmp_path / 'results'}",
        "dataset.max_new_tokens=4",
        "dataset.train_rows=29",  # in the last pass one rank has a row and the other none
        "dataset.test_rows=2",
        "model.real_batch_size=8",
        "model.per_device_batch_size=2",
        "peft.lora_r=4",
    ]


def read(place: Path) -> dict[str, dict]:
    """The records in a results folder, by method."""
    records = [json.loads(file.read_text()) for file in place.glob("*/run.json")]
    return {record["method"]: record for record in records}


def update_norms(place: Path, record: dict) -> list[float]:
    """What a run has logged of its one diagnosed layer."""
    (name,) = record["diagnostics"]["layers"]
    lines = map(json.loads, (place / record["run_id"] / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if (key := f"update_norm/{name}") in line]


def torchrun(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *TORCHRUN, *command],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.mark.slow
def test_two_ranks_end_where_one_process_with_the_same_global_batch_ends(overrides, tmp_path):
    # AdamW's first steps are sign-like: they would amplify the last bits of a gradient that is
    # nearly zero, in which sums in another order differ. A larger eps leaves them as they are.
    sweep = ["-m", "init=lora_one,pissa", *overrides]
    sweep += ["model.learning_rate=1e-3", "optimizer.eps=1e-5", "diagnostics.layers=1"]
    alone, tasks, ranks = (tmp_path / name for name in ("alone", "srun", "torchrun"))

    def command(place: Path) -> list[str]:
        return [str(ROOT / "run_exp.py"), *sweep, f"output_dir={place}"]

    one = subprocess.run(
        [sys.executable, *command(alone)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert one.returncode == 0
    main, other = srun(command(tasks), 2)
    launched = torchrun([*command(ranks), "init=lora_one"])
    assert (main.status, other.status, launched.returncode) == (0, 0, 0), main.err + launched.stderr
    assert other.out == ""
    assert main.out.count("2 rows x 2 accumulation x 2 ranks = 8") == 2
    assert main.out.count("done: accuracy") == 2
    assert launched.stdout.count("done: accuracy") == 1
    expected = read(alone)
    for place, count in ((tasks, 2), (ranks, 1)):
        found = read(place)
        assert len(found) == count
        for method, record in found.items():
            assert record["train"]["steps"] == expected[method]["train"]["steps"] == 4
            # Rows that fill the last pass are no tokens of the training.
            assert record["train"]["tokens"] == expected[method]["train"]["tokens"]
            losses = expected[method]["losses"]
            assert record["losses"]["validation"] == pytest.approx(losses["validation"], abs=1e-5)
            weights, reference = (
                load_file(folder / each["run_id"] / "adapter" / "adapter_model.safetensors")
                for folder, each in ((place, record), (alone, expected[method]))
            )
            for name, tensor in reference.items():
                assert (weights[name] - tensor).abs().max() < 1e-5
            logs = update_norms(place, record), update_norms(alone, record)
            assert logs[0] == pytest.approx(logs[1], rel=1e-3)
            assert len(logs[0]) == 3  # rank 0 alone: the start, the first step, the last


SPOILT = """
import os, signal, sys
sys.path.insert(0, {root!r})
from lora_one.errors import NonFiniteError
from lora_one.harness.cli import launch
from lora_one.harness.distributed.ranks import rank
from run_exp import CONF, run

def spoilt(config):
    from lora_one.harness.training.loop import GuardedTrainer
    whole = GuardedTrainer.training_step

    def training_step(self, *args, **kwargs):
        if rank() == {rank} and config.method == "pissa" and self.state.global_step == 1:
            {deed}
        return whole(self, *args, **kwargs)

    GuardedTrainer.training_step = training_step
    return run(config)

if __name__ == "__main__":
    sys.exit(launch(spoilt, CONF, __file__))
"""


def spoilt(folder: Path, deed: str, rank: int = 1) -> str:
    """The entry point, but for what one rank does in the second step of PiSSA."""
    program = folder / "spoilt.py"
    program.write_text(SPOILT.format(root=str(ROOT), rank=rank, deed=deed))
    return str(program)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_an_error_of_one_rank_in_training_fails_the_run_on_all(overrides, tmp_path, launcher):
    program = spoilt(tmp_path, 'raise NonFiniteError("step 2: loss nan")')
    command = [program, *overrides, "init=pissa"]
    if launcher == "srun":
        main, other = srun(command, 2)
        assert (main.status, other.status) == (1, 1)
        said = main.err + other.err
    else:
        answer = torchrun(command)
        assert answer.returncode == 1
        said = answer.stderr
    assert said.count("NonFiniteError: step 2: loss nan") == 1
    assert "failed: rank 1 on host " in said
    record = read(tmp_path / "results")["pissa"]
    assert record["status"] == "failed"
    assert record["error"]["type"] == "NonFiniteError"
    assert record["error"]["message"].startswith("rank 1 on host ")
    assert "training_step" in record["error"]["traceback"]
    assert record["error"]["phase"] == "train"


@pytest.mark.slow
def test_a_rank_that_is_killed_fails_its_point_of_a_sweep_on_all_ranks(overrides, tmp_path):
    program = spoilt(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    command = [program, "-m", "init=pissa,lora", *overrides]
    main, other = srun(command, 2)
    assert (main.status, other.status) == (1, 1)
    assert main.err.count("failed: rank 1 on host ") == 1
    assert main.err.count("ended without a word") == 1
    records = read(tmp_path / "results")
    assert {method: record["status"] for method, record in records.items()} == {
        "pissa": "failed",
        "lora": "finished",
    }
    assert "ended without a word" in records["pissa"]["error"]["message"]
    command[0] = str(ROOT / "run_exp.py")
    main, other = srun(command, 2)
    assert (main.status, other.status) == (0, 0), main.err
    assert main.out.count("already done") == main.out.count("done: accuracy") == 1


def test_a_batch_that_the_ranks_cannot_share_is_said_once_and_leaves_nothing(overrides, tmp_path):
    command = [str(ROOT / "run_exp.py"), *overrides, "model.per_device_batch_size=8"]
    main, other = srun(command, 2)
    assert (main.status, other.status) == (2, 2)
    error = (
        "model.real_batch_size=8 is not a multiple of 8 rows per device x 2 ranks = 16. Give "
        "model.per_device_batch_size=4 or a divisor of it.\n"
    )
    assert main.err.endswith(error)
    assert main.err.count("real_batch_size") == 1
    assert (main.out, other.out) == ("", "")
    assert "error" not in other.err
    assert not (tmp_path / "results").exists()


def test_ranks_that_disagree_on_the_configuration_write_nothing(overrides, tmp_path):
    command = [str(ROOT / "run_exp.py"), *overrides, "seed={rank}"]
    main, other = srun(command, 2)
    assert (main.status, other.status) == (2, 2)
    assert "the ranks disagree on the configuration: " in main.err
    assert "seed is 0 on rank 0 and 1 on rank 1" in main.err
    assert (main.err.count("\n"), other.err) == (1, "")
    assert not (tmp_path / "results").exists()


def test_questions_are_answered_once():
    main, other = srun([str(ROOT / "run_exp.py"), "--cfg", "job"], 2)
    assert (main.status, other.status) == (0, 0)
    assert "lora_r" in main.out
    assert (other.out, other.err) == ("", "")
