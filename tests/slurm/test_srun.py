"""A bare ``srun``: its tasks are ranks of one run."""

import pytest
from safetensors.torch import load_file

from .cluster import PROGRAM, call, records

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_two_ranks_train_as_one_process(tiny, results):
    # AdamW divides by the size of a gradient: where that is about rounding, so is the step's
    # direction, and its length is the learning rate. This one keeps such weights below 1e-5.
    tiny = [*tiny, "model.max_steps=4", "model.epochs=2", "model.learning_rate=1e-3"]
    alone = call(*PROGRAM, *tiny)
    assert alone.returncode == 0, alone.stderr
    together = [o.replace(str(results), f"{results}-2") for o in tiny]
    ranks = call("srun", "-n", "2", *PROGRAM, *together)
    assert ranks.returncode == 0, ranks.stderr
    assert "4 rows x 1 accumulation x 2 ranks = 8" in ranks.stdout
    folder, other = next(results.glob("arith*")), next(results.parent.glob("results-2/arith*"))
    assert folder.name == other.name
    one = load_file(folder / "adapter" / "adapter_model.safetensors")
    two = load_file(other / "adapter" / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert (weight - two[name]).abs().max() <= 1e-5, name
    (first,), (second,) = records(results), records(results.parent / "results-2")
    for loss, value in first["losses"].items():
        assert second["losses"][loss] == pytest.approx(value, abs=1e-5)


def test_the_published_line_runs(tiny, results):
    answer = call("srun", *PROGRAM, "-m", "++init.direction=LoRA-One", *tiny)
    assert answer.returncode == 0, answer.stderr
    (record,) = records(results)
    assert (record["status"], record["method"]) == ("finished", "lora_one")


def test_ranks_that_do_not_divide_the_batch_are_refused(tiny, results):
    answer = call("srun", "-n", "3", "--overcommit", *PROGRAM, *tiny)
    assert answer.returncode == 2
    (message,) = [line for line in answer.stderr.splitlines() if line.startswith("error:")]
    assert "model.real_batch_size=8" in message
    assert "3" in message
    assert not list(results.glob("*/run.json"))
