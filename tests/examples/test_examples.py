"""Every example runs as its docstring says, and plain PEFT loads the adapter it leaves."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BASE = "data/tiny_llama"
KINDS = {
    "plain_loop": "causal",
    "trainer": "causal",
    "trl_sft": "causal",
    "trl_dpo": "causal",
    "classification": "classifier",
    "qlora": "four_bit",
    "accelerate_two": "causal",
}
STEPS = {"classification": 16}  # its head starts at random, and the loss falls later
NEEDS = {"trl_sft": "trl", "trl_dpo": "trl", "qlora": "bitsandbytes"}

pytestmark = pytest.mark.slow


def skip_without(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """``python(script, *arguments)`` in processes of their own; returns what they said."""
    output = tmp_path_factory.mktemp("output") / "said"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path_factory.mktemp("hugging_face")),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    parent = subprocess.Popen(
        [sys.executable, HERE / "forking.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
        text=True,
    )

    def run(*command, environments=({},)):
        output.unlink(missing_ok=True)
        job = {"command": command, "output": output, "environments": environments}
        parent.stdin.write(json.dumps(job, default=str) + "\n")
        parent.stdin.flush()
        statuses = json.loads(parent.stdout.readline())
        said = output.read_text()
        assert not any(statuses), said
        return said

    yield run
    parent.stdin.close()
    parent.wait()


def losses(said):
    return [float(loss) for loss in re.findall(r"validation loss (\d+\.\d+)", said)]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "accelerate_two"])
def test_an_example_trains_and_plain_peft_loads_its_adapter(name, python, tmp_path):
    skip_without(NEEDS.get(name, "torch"))
    steps = STEPS.get(name, 4)
    script = (HERE / "recorded.py", f"examples/{name}.py")
    said = python(*script, "--output", tmp_path, "--steps", str(steps))
    base, start, trained = losses(said)
    assert trained < start < base
    assert f"adapter: {tmp_path / 'adapter'}" in said
    python(HERE / "plain_peft.py", KINDS[name], BASE, tmp_path)


def test_two_processes_share_the_start_and_leave_one_adapter(python, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    # What torchrun and accelerate launch tell the processes that they start.
    ranks = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | address
        for rank in "01"
    ]
    script = (HERE / "recorded.py", "examples/accelerate_two.py")
    said = python(*script, "--output", tmp_path, "--steps", "4", environments=ranks)
    assert said.count("2 processes on") == 1
    base, start, trained = losses(said)
    assert trained < start < base
    python(HERE / "plain_peft.py", "causal", BASE, tmp_path)


THREE_LINES = """
    import itertools, torch, lora_one
    lora_one.initialize(
        trainer.model, itertools.islice(trainer.get_train_dataloader(), 4), method="lora_one"
    )
    trainer.optimizer = lora_one.create_preconditioned_optimizer(
        trainer.model, torch.optim.AdamW, lr=training_args.learning_rate
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    lora_one.export_adapter(trainer.model, training_args.output_dir + "/adapter")
"""


def test_the_sft_script_that_trl_releases_trains_with_our_three_lines(python, tmp_path):
    skip_without("trl")
    released = Path(importlib.util.find_spec("trl").origin).parent / "scripts" / "sft.py"
    train = "    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)\n"
    before, after = released.read_text().split(train)
    (tmp_path / "sft.py").write_text(before + THREE_LINES + after)
    (tmp_path / "rows").mkdir()
    lines = (ROOT / "data/arithmetic/train.jsonl").read_text().splitlines()[:128]
    with (tmp_path / "rows" / "train.jsonl").open("w") as file:
        for row in map(json.loads, lines):
            pair = {"prompt": f"Q: {row['question']}\nA: ", "completion": row["answer"]}
            file.write(json.dumps(pair) + "\n")
    options = {
        "model_name_or_path": BASE,
        "dataset_name": tmp_path / "rows",
        "output_dir": tmp_path / "run",
        "lora_target_modules": "all-linear",
        "learning_rate": 6e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    said = python(HERE / "recorded.py", tmp_path / "sft.py", "--use_peft", *flags)
    seen = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", said)]
    assert len(seen) == 4
    assert seen[-1] < seen[0]
    python(HERE / "plain_peft.py", "causal", BASE, tmp_path / "run")


def test_the_gradient_that_starts_dpo_is_that_of_trls_loss(python, tmp_path):
    skip_without("trl")
    python(HERE / "dpo_gradient.py", "--output", tmp_path, "--steps", "1")


def test_the_table_names_every_example_with_the_command_of_its_docstring():
    scripts = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
    assert scripts == sorted(KINDS)
    table = (ROOT / "examples" / "README.md").read_text()
    for name in scripts:
        first = re.search(
            r"^    (.* examples/.*)$", (ROOT / f"examples/{name}.py").read_text(), re.M
        )
        assert f"`{first[1]}`" in table
