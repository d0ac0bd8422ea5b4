"""The evaluation stage of a run: what is evaluated, measured, consented to, and refused."""

import gc
import json
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one.errors import InputError
from lora_one.harness import evaluation
from lora_one.harness.records.folder import run_id
from lora_one.reports.records import find_runs
from lora_one.reports.table import summarise
from lora_one.tasks import Task, create_task
from lora_one.tasks.arithmetic import Arithmetic
from lora_one.tasks.registry import TASKS

from .evaluated import predictions
from .long_run import folder_of


def test_without_training_the_start_is_the_result(small, run):
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


@pytest.mark.parametrize("start", ["LoRA-One", "EVA"])
def test_a_start_from_rows_without_training_rows_is_refused(
    start, small, run, copy_of, rows_folder
):
    rows = copy_of(rows_folder)
    (rows / "train.jsonl").unlink()
    config = small("train=none", f"init.direction={start}", f"dataset.path={rows}")
    with pytest.raises(InputError, match=f"{start} starts from training rows, also with"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_full_fine_tuning_without_training_is_refused(small):
    with pytest.raises(InputError, match="train=none init=lora"):
        small("train=none", "peft=full_ft", "init=lora")


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


def test_replies_can_be_written_without_being_judged(programs, run, monkeypatch, capsys):
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


def test_a_rank_that_vllm_has_no_place_for_is_refused_before_the_training(small, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setattr("lora_one.adapters.serving.VLLM_RANKS", (1, 8))
    asked = ("evaluation.engine=vllm", "model.bf16=true")
    base, data = SimpleNamespace(architecture="causal"), SimpleNamespace(test=[])
    for choices, rank in (
        (["init=pissa", "peft.lora_r=5"], 10),
        (["init=lora", "peft.lora_r=9"], 9),
        (["init=lora", "peft=adalora", "peft.lora_r=6"], 9),
        (["init=lora", "export.rank=11"], 11),
    ):
        with pytest.raises(InputError, match=f"rank {rank}, and vLLM takes at most"):
            evaluation.check_engine(small(*asked, *choices), base, data, None)
    evaluation.check_engine(small(*asked, "init=pissa", "export.rank=8"), base, data, None)
    # Which layer gets how many is known when the gradient is.
    with pytest.raises(InputError, match=r"rank 1[0-9], and vLLM takes at most"):
        run(small(*asked, "init=lora_one", "peft.lora_r=6", "init.rank_allocation=energy"))


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
