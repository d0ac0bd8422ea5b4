"""The evaluation stage of a run: what is evaluated, resumed, shared, and agreed to."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one.errors import InputError
from lora_one.evaluation.engines import TransformersEngine
from lora_one.harness import evaluation
from lora_one.harness.config.given_adapter import read_adapter
from lora_one.harness.config.published import translate
from lora_one.harness.models.base import base_dtype, has_bf16
from lora_one.harness.records.folder import run_id
from lora_one.reports.records import find_runs
from lora_one.reports.table import summarise
from lora_one.tasks import Task, create_task
from lora_one.tasks.arithmetic import Arithmetic
from lora_one.tasks.registry import TASKS

ROOT = Path(__file__).parents[2]


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def untimed(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if k not in ("seconds", "answers_per_second")}


@pytest.fixture
def folder_of():
    return lambda config: Path(config.output_dir) / run_id(config)


@pytest.fixture
def adapter(tmp_path, llama_folder) -> Path:
    """A LoRA adapter that changes what the tiny Llama says."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    for name, factor in model.named_parameters():
        if "lora_" in name:
            factor.data.mul_(20)
    model.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def test_without_training_the_start_is_the_result(small, run, folder_of):
    config = small("train=none")
    record = run(config)
    assert record["train"]["steps"] == 0
    losses = record["losses"]
    assert losses["validation"] == losses["start_validation"] != losses["base_validation"]
    assert record["metrics"]["n"] == 6
    assert "not trained (train=none)" in (folder_of(config) / "adapter" / "README.md").read_text()
    assert record["run_id"] != run_id(small())
    assert "-lora_one-r4-none-s0-" in record["run_id"]
    # The first step of the trained run starts where this one ends.
    assert run(small())["losses"]["start_validation"] == losses["start_validation"]
    results = summarise(find_runs(Path(config.output_dir)))
    rows = {row[1]: row for row in results.rows}
    assert rows["none"][:3] == ["lora_one", "none", "-"]
    assert rows["adamw"][0] == "lora_one"


def test_settings_of_a_training_that_does_not_happen_make_no_other_run(small):
    one = run_id(small("train=none"))
    assert run_id(small("train=none", "model.learning_rate=1", "optimizer=loraplus")) == one
    assert run_id(small("train=none", "init.stable_gamma=3")) != one
    assert run_id(small("train=none", "evaluation.temperature=1")) != one


def test_what_an_evaluation_does_not_read_makes_no_other_run(small, adapter):
    given = f"evaluate.adapter={adapter}"
    untouched = ("dataset.train_rows=5", "dataset.validation_rows=3", "model.max_length=99")
    for run_of, same, other in (
        ([given], ["seed=3"], ["evaluation.temperature=1", "dataset.test_rows=2"]),
        (["train=none", "init=lora"], ["model.seed=3"], ["init.seed=3", "seed=3"]),
    ):
        one = run_id(small(*run_of))
        for setting in (*untouched, "model.seed=3", "dataset.seed=3", *same):
            assert run_id(small(*run_of, setting)) == one
        for setting in other:
            assert run_id(small(*run_of, setting)) != one
    # A gradient takes training rows, a benchmark may be told of them, and drawn replies have seeds.
    for run_of, setting in (
        (["train=none"], "dataset.train_rows=5"),
        (["train=none"], "model.max_length=99"),
        ([given, "dataset=meta_math"], "dataset.seed=3"),
        ([given, "evaluation.temperature=1"], "seed=3"),
        ([], "dataset.validation_rows=3"),
    ):
        assert run_id(small(*run_of, setting)) != run_id(small(*run_of))


def test_the_seed_of_a_head_that_starts_at_random_is_read(small, adapter):
    head = (f"evaluate.adapter={adapter}", "model.type=SequenceClassification", "dataset=sst2")
    assert run_id(small(*head, "model.seed=3")) != run_id(small(*head))


@pytest.mark.parametrize("peft", [[], ["peft=full_ft", "init=lora"]])
def test_the_base_under_a_given_adapter_is_frozen_whatever_peft_says(small, adapter, peft):
    config = small(f"evaluate.adapter={adapter}", "model.bf16=true", *peft)
    assert base_dtype(config) == (torch.bfloat16 if has_bf16() else torch.float32)
    assert run_id(config) == run_id(small(f"evaluate.adapter={adapter}", "model.bf16=true"))


def test_seeds_that_change_no_reply_are_not_counted_as_runs(small, run, adapter):
    """The base model is the base model, whatever the seed of its untrained adapter."""
    names = [run(small("train=none", "init=lora", f"seed={seed}"))["run_id"] for seed in (0, 1, 2)]
    assert len(set(names)) == 3
    results = summarise(find_runs(Path(small().output_dir)))
    (row,) = (dict(zip(results.columns, row, strict=True)) for row in results.rows)
    assert row["seeds"] == "1"
    assert "±" not in row["accuracy"]
    assert len(results.notes) == 2


def test_seeds_of_drawn_replies_are_counted(small, run):
    for seed in (0, 1):
        run(small("train=none", "init=lora", "evaluation.temperature=1", f"seed={seed}"))
    results = summarise(find_runs(Path(small().output_dir)))
    assert dict(zip(results.columns, results.rows[0], strict=True))["seeds"] == "2"
    assert not results.notes


def test_the_base_model_has_a_row_of_its_own_and_needs_test_rows_only(
    small, run, copy_of, rows_folder
):
    """train=none init=lora: LoRA's zero start is the base model."""
    rows = copy_of(rows_folder)
    for split in ("train", "validation"):
        (rows / f"{split}.jsonl").unlink()
    record = run(small("train=none", "init=lora", f"dataset.path={rows}"))
    assert record["metrics"]["n"] == 6
    assert record["metrics"]["validation_loss"] is None
    assert record["data"]["rows"] == {"train": 0, "validation": 0, "test": 6}
    assert (record["method"], record["train"]["steps"]) == ("lora", 0)
    cells = summarise(find_runs(Path(small().output_dir)))
    row = dict(zip(cells.columns, cells.rows[0], strict=True))
    assert (row["optimiser"], row["lr"], row["validation loss"]) == ("none", "-", "-")


def test_a_gradient_without_training_rows_is_refused(small, run, copy_of, rows_folder):
    rows = copy_of(rows_folder)
    (rows / "train.jsonl").unlink()
    config = small("train=none", f"dataset.path={rows}")
    with pytest.raises(InputError, match="LoRA-One takes a gradient of training rows, also with"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_full_fine_tuning_without_training_is_refused(small):
    with pytest.raises(InputError, match="train=none init=lora"):
        small("train=none", "peft=full_ft", "init=lora")


def test_an_adapter_that_is_there_is_evaluated_as_it_is(small, run, adapter, folder_of):
    base = run(small("train=none", "init=lora"))
    config = small(f"evaluate.adapter={adapter}")
    record = run(config)
    assert record["method"] == "adapter"
    assert record["adapter"] == {
        "path": str(adapter),
        "sha256": sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "base": config.model.name,
    }
    assert record["train"]["steps"] == 0
    assert "export" not in record
    ours, theirs = folder_of(config), Path(config.output_dir) / base["run_id"]
    assert {row["reply"] for row in predictions(ours)} != {
        row["reply"] for row in predictions(theirs)
    }
    assert not (ours / "adapter").exists()
    assert run(config) == record  # finished: not done again


def test_what_a_run_exports_evaluates_to_what_the_run_says(small, run, folder_of):
    config = small("init=pissa", "model.learning_rate=1e-2")
    record = run(config)
    exported = folder_of(config) / "adapter"
    again = run(small(f"evaluate.adapter={exported}"))
    replies = [row["reply"] for row in predictions(Path(config.output_dir) / again["run_id"])]
    assert replies == [row["reply"] for row in predictions(folder_of(config))]
    assert again["run_id"] != record["run_id"]


def test_an_adapter_that_was_replaced_is_evaluated_again(small, run, adapter):
    config = small(f"evaluate.adapter={adapter}")
    first = run(config)
    file = adapter / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1
    file.write_bytes(bytes(raw))
    second = run(config)
    assert second["adapter"]["sha256"] != first["adapter"]["sha256"]


def test_an_adapter_without_a_model_means_its_own_base(adapter, llama_folder, compose, tmp_path):
    overrides, notes = translate([f"evaluate.adapter={adapter}"])
    assert compose(*overrides).model.name == str(llama_folder)
    assert f"model.name={llama_folder}" in notes[0]
    overrides, notes = translate([f"evaluate.adapter={adapter}", "model=llama"])
    assert compose(*overrides).model.name == "meta-llama/Llama-2-7b-hf"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"add model\.name=<its base>"):
        translate([f"evaluate.adapter={adapter}"])


def test_an_adapter_that_cannot_be_used_is_refused_before_anything_is_written(
    small, run, adapter, llama_folder, tmp_path
):
    with pytest.raises(InputError, match="there is no such folder"):
        run(small(f"evaluate.adapter={tmp_path / 'nowhere'}"))
    with pytest.raises(
        InputError, match=r"no adapter_config\.json.*model\.name=<folder> train=none"
    ):
        run(small(f"evaluate.adapter={llama_folder}"))
    with pytest.raises(InputError, match=r"does not fit model\.name=.*lora_A\.weight is \(4, 32\)"):
        run(small(f"evaluate.adapter={adapter}", f"model.name={ROOT / 'data' / 'tiny_llama'}"))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "IA3"}))
    with pytest.raises(InputError, match="a IA3 adapter; expected LORA"):
        run(small(f"evaluate.adapter={adapter}"))
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": "8"}))
    with pytest.raises(InputError, match=r"PEFT cannot make an adapter .*\(TypeError"):
        run(small(f"evaluate.adapter={adapter}"))
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"task_type": ["x"]}))
    with pytest.raises(InputError, match=r"has task_type=\['x'\]; expected a text"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").write_bytes(b'{"peft_type": "\xff"}')
    with pytest.raises(InputError, match=r"adapter_config\.json cannot be read"):
        read_adapter(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is damaged"):
        run(small(f"evaluate.adapter={adapter}"))
    assert not Path(small().output_dir).exists()


def test_a_base_with_an_adapter_beside_it_is_refused(small, run, adapter, llama_folder, tmp_path):
    both = shutil.copytree(llama_folder, tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    config = small(f"model.name={both}")
    with pytest.raises(InputError, match="beside the weights lies an adapter"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_an_adapter_that_lacks_a_module_it_says_it_trained_is_refused(small, run, adapter):
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["modules_to_save"] = ["lm_head"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"lacks .*lm_head.*modules_to_save"):
        run(small(f"evaluate.adapter={adapter}"))


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
    small, run, folder_of, monkeypatch, count_prompts, capsys, tmp_path, overrides
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
    small, run, folder_of, monkeypatch, count_prompts, capsys, copy_of, llama_folder
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
    small, run, folder_of, monkeypatch, count_prompts
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


class Programs(Arithmetic):
    """A benchmark whose replies would be run."""

    name = "programs"
    executes_code = True


@pytest.fixture
def programs(small, monkeypatch):
    monkeypatch.setitem(TASKS, "programs", Programs)

    def from_overrides(*overrides):
        return small("dataset.name=programs", "train=none", "init=lora", *overrides)

    return from_overrides


@pytest.mark.parametrize("dry", ["dry_run=true", "dry_run=false"])
def test_consent_is_asked_before_anything_is_loaded_or_written(programs, run, dry):
    from lora_one.harness.dry_run import show_plan

    config = programs(dry)
    with pytest.raises(InputError, match=r"allow_code_execution=true.*generate_only=true"):
        show_plan([config]) if config.dry_run else run(config)
    assert not Path(config.output_dir).exists()


def test_with_consent_replies_are_judged(programs, run):
    assert "accuracy" in run(programs("evaluation.allow_code_execution=true"))["metrics"]


def test_a_weaker_sandbox_is_said_before_anything_is_generated(programs, run, monkeypatch, capsys):
    from lora_one.evaluation.sandbox import Isolation, SandboxError, judge

    weaker = Isolation("rlimits", {"unshare": "forbidden here"})
    monkeypatch.setattr(judge, "isolation", lambda: weaker)
    run(programs("evaluation.allow_code_execution=true"))
    said = capsys.readouterr().out
    assert "'rlimits'" in said.split("done:")[0]
    assert "(unshare: forbidden here)" in said

    def fail():
        raise SandboxError("no sandbox works")

    monkeypatch.setattr(judge, "isolation", fail)
    run(programs("evaluation.generate_only=true"))
    with pytest.raises(SandboxError):
        run(programs("evaluation.allow_code_execution=true", "seed=7"))


def test_replies_can_be_written_without_being_judged(programs, run, monkeypatch, folder_of, capsys):
    monkeypatch.setattr(Task, "judge", None)
    config = programs("evaluation.generate_only=true")
    record = run(config)
    assert [row["scores"] for row in predictions(folder_of(config))] == [{}] * 6
    assert record["metrics"]["n"] == 6
    assert "accuracy" not in record["metrics"]
    assert "done: replies not judged (n = 6)" in capsys.readouterr().out
    results = summarise(find_runs(Path(config.output_dir)))
    assert dict(zip(results.columns, results.rows[0], strict=True))["accuracy"] == "-"


CONTRADICTIONS = {
    "samples": (["evaluation.samples=2"], r"samples=2 greedy replies.*temperature=<above 0>"),
    "top_p": (["evaluation.top_p=0.9"], "has no effect on greedy replies"),
    "no seed": (["evaluation.temperature=1", "evaluation.seed=null"], "seed is needed"),
    "size": (["evaluation.batch_size=0"], "batch_size=0: expected greater than 0"),
    "dora": (["evaluation.engine=vllm", "peft=dora"], "plain LoRA only"),
    "typo": (["evaluate.adaptor=x"], "Did you mean 'adapter'"),
    "train": (["train=non"], "Did you mean 'none'"),
}


@pytest.mark.parametrize(
    ("overrides", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys()
)
def test_settings_that_contradict_each_other_are_refused(small, overrides, message):
    with pytest.raises(InputError, match=message):
        small(*overrides)


def test_greedy_replies_do_not_depend_on_a_seed(small):
    assert run_id(small("evaluation.seed=5")) == run_id(small())
    assert run_id(small("evaluation.temperature=1", "evaluation.seed=5")) != run_id(
        small("evaluation.temperature=1")
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [([], "pip install vllm"), (["t5"], "causal models only"), (["ranks"], "in one process")],
)
def test_what_vllm_cannot_do_is_said_before_anything_is_loaded(
    small, run, t5_folder, monkeypatch, overrides, message
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    more = [f"model.name={t5_folder}"] if overrides == ["t5"] else []
    if overrides == ["ranks"]:
        monkeypatch.setattr("lora_one.harness.evaluation.world_size", lambda: 2)
    config = small("evaluation.engine=vllm", "train=none", "init=lora", *more)
    with pytest.raises(InputError, match=message):
        run(config)
    assert not Path(config.output_dir).exists()


def test_adapters_that_vllm_would_stop_at_or_scale_otherwise_are_refused(
    small, run, adapter, monkeypatch
):
    """Its kernels take factors of 16 bits, and it reads no patterns of alpha."""
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    config = small("evaluation.engine=vllm", "train=none", "init=lora")
    with pytest.raises(InputError, match=r"in 16 bits only.*model\.bf16=true"):
        run(config)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {"v_proj": 3}}))
    given = ("evaluation.engine=vllm", "model.bf16=true", f"evaluate.adapter={adapter}")
    with pytest.raises(InputError, match="alpha_pattern: most releases multiply every layer by 2;"):
        run(small(*given))
    assert not Path(config.output_dir).exists()


def test_vllm_gets_the_memory_of_a_training_that_is_over(small, monkeypatch):
    """A Trainer and its callbacks refer to each other: only a collection frees what they hold."""

    class Trainer:
        def __init__(self):
            self.callback = SimpleNamespace(trainer=self)

    for name in ("eos_token_ids", "context_of"):
        monkeypatch.setattr(evaluation, name, lambda *_: ())
    monkeypatch.setattr(evaluation, "VllmEngine", lambda *_, **__: left())
    plan = SimpleNamespace(
        base=SimpleNamespace(architecture="causal", location="base", config=None),
        tokenizer=None,
        given=None,
        adapter=object(),
    )
    config = small("evaluation.engine=vllm", "model.bf16=true")
    gc.disable()
    try:
        left = weakref.ref(Trainer())
        assert evaluation.make_engine(config, plan, torch.nn.Linear(1, 1), Path()) is None
    finally:
        gc.enable()


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


def test_the_loss_of_the_test_rows_is_that_of_the_exported_adapter_on_their_targets(
    small, run, llama_folder, rows_folder
):
    config = small("evaluation.metric=loss", "init=lora_one")
    record = run(config)
    assert record["primary_metric"] == "test_loss"
    folder = Path(config.output_dir) / record["run_id"]
    assert not (folder / "predictions.jsonl").exists()

    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    total, tokens = 0.0, 0
    for example in create_task("arithmetic", path=str(rows_folder)).load("test"):
        prompt = tokenizer(example.prompt)["input_ids"]
        target = tokenizer(example.target, add_special_tokens=False)["input_ids"]
        target.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        total += float(cross_entropy(logits, torch.tensor(target), reduction="sum"))
        tokens += len(target)
    assert record["metrics"]["test_loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert record["metrics"]["n"] == 6


def test_a_run_for_its_validation_loss_asks_no_test_row(small, run):
    config = small("evaluation.metric=validation_loss", "init=lora")
    record = run(config)
    assert record["primary_metric"] == "validation_loss"
    assert record["metrics"] == {"validation_loss": record["losses"]["validation"], "n": 8}
    assert not (Path(config.output_dir) / record["run_id"] / "predictions.jsonl").exists()


def test_the_way_of_measuring_makes_another_run_and_its_default_the_same_as_before(small):
    plain, named = small("init=lora"), small("init=lora", "evaluation.metric=task")
    assert run_id(plain) == run_id(named)
    assert run_id(plain) != run_id(small("init=lora", "evaluation.metric=loss"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["evaluation.metric=loss", "evaluation.generate_only=true"], "makes none"),
        (
            ["evaluation.metric=validation_loss", "train=none", "init=lora"],
            "needs validation rows",
        ),
        (["evaluation.metric=accuracy"], "evaluation.metric"),
    ],
)
def test_a_way_of_measuring_that_cannot_be_is_refused(compose, overrides, said):
    with pytest.raises(InputError, match=said):
        compose(*overrides)
