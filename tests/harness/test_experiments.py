"""The presets of published tables: they say what was published, and the command line still wins."""

import json
import re
import shlex
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_one.errors import InputError
from lora_one.harness.cli import prepare_command
from lora_one.harness.config.compose import composer, expand
from lora_one.harness.config.schema import Config, DatasetConfig
from lora_one.harness.dry_run import foresee, show_plan
from lora_one.harness.records.folder import run_id
from lora_one.reports.published import load, mismatches, numbers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "conf" / "experiment"
# The others are comparisons of ours, under no published recipe.
NAMES = sorted(
    f"{file.parent.name}/{file.stem}"
    for file in FOLDER.glob("*/*.yaml")
    if file.parent.name != "fair"
)

# What the sources say, written down without looking at conf/. A method's own settings (gamma, the
# optimiser) are those of the preset's default method.
T5_GLUE = {
    "train": "full",
    "model.name": "google-t5/t5-base",
    "model.type": "ConditionalGeneration",
    "model.bf16": False,
    "model.learning_rate": 1e-4,
    "model.schedule": "cosine",
    "model.warmup_steps": 0.03,
    "model.epochs": 1,
    "model.max_steps": None,
    "model.real_batch_size": 32,
    "model.max_length": 128,
    "model.weight_decay": 0,
    "peft.use_peft": True,
    "peft.lora_r": 8,
    "peft.lora_alpha": 16,
    "peft.use_rslora": True,
    "peft.lora_dropout": 0,
    "peft.lora_target_modules": "all",
    "init.dtype": "fp32",
    "init.stable_gamma": 16,
    "init.bsz": 1,
    "init.iters": 8,
    "optimizer.name": "adamw",
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "evaluation.temperature": 0,
    "dataset.train_rows": None,
    "dataset.test_rows": None,
    "dataset.loss_on": "response",
}
LLAMA2 = T5_GLUE | {
    "model.name": "meta-llama/Llama-2-7b-hf",
    "model.type": "CausalLM",
    "model.bf16": True,
    "model.max_length": 1024,
    "dataset.name": "meta_math",
    "dataset.subset": "gsm_100k",
    "dataset.order": "published",
    "dataset.max_tokens": 512,
    "dataset.train_rows": 100_000,
    "dataset.validation_rows": 10_000,
    "dataset.test_benchmark": "gsm8k",
    "dataset.max_new_tokens": 512,
}
TABLE_3 = LLAMA2 | {
    "seed": 9,
    "init.direction": "LoRA-One",
    "init.stable_gamma": 128,
    "model.learning_rate": 2e-4,
    "model.schedule": "linear",
    "model.warmup_steps": 100,
}
MISTRAL = {
    "seed": 42,
    "init.direction": "LoRA",
    "model.name": "mistralai/Mistral-7B-v0.1",
    "model.epochs": 5,
    "model.real_batch_size": 8,
    "model.weight_decay": 0.01,
    "model.learning_rate": 5e-5,
    "peft.lora_r": 16,
    "peft.lora_alpha": 16,
    "peft.lora_dropout": 0.05,
    "peft.lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"],
    "optimizer.name": "preconditioned_adamw",
    "optimizer.betas": [0.9, 0.999],
}
# task: damping, learning rate of scaled AdamW
MISTRAL_TASKS = {
    "rte": (4.5, 5e-5),
    "cola": (0.011, 5e-5),
    "sst2": (0.9, 5e-5),
    "stsb": (0.01, 5e-5),
    "mrpc": (100, 5e-5),
    "wnli": (10, 5e-5),
    "qnli": (1e-6, 1e-5),
    "mnli": (1e-6, 3e-5),
    "qqp": (1e-6, 3e-5),
}
SETTINGS = {
    "lora_one/table2": T5_GLUE | {"seed": 42, "init.direction": "LoRA-One"},
    "lora_one/table2_start": {
        "train": "none",
        "model.name": "google-t5/t5-base",
        "peft.lora_r": 8,
        "init.direction": "LoRA-One",
        "init.bsz": 1,
        "init.iters": 8,
        "init.stable_gamma": "auto",
    },
    "lora_one/table3": TABLE_3,
    "lora_one/table4": TABLE_3,
    "lora_one/table3_lr2e5_gamma64": TABLE_3
    | {
        "seed": 0,
        "init.stable_gamma": 64,
        "model.learning_rate": 2e-5,
        "model.schedule": "cosine",
        "model.warmup_steps": 0.03,
    },
    "lora_one/figure5": TABLE_3
    | {"model.epochs": 4, "dataset.subset": "full", "dataset.train_rows": None},
    "lora_one/commonsense": {
        "seed": 42,
        "dataset.name": "commonsense",
        "dataset.train_rows": None,
        "dataset.parts": None,
        "model.name": "meta-llama/Llama-2-7b-hf",
        "model.bf16": True,
        "model.learning_rate": 5e-5,
        "model.schedule": "linear",
        "model.warmup_steps": 100,
        "model.epochs": 3,
        "model.real_batch_size": 16,
        "model.max_length": 256,
        "model.weight_decay": 0,
        "peft.lora_r": 16,
        "peft.lora_alpha": 16,
        "peft.use_rslora": True,
        "peft.lora_dropout": 0.05,
        "peft.lora_target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        "init.direction": "LoRA-One",
        "init.stable_gamma": 128,
        "init.bsz": 1,
        "init.iters": 8,
        "optimizer.name": "adamw",
    },
    "lora_ga/glue": T5_GLUE | {"init.direction": "LoRA-GA"},
    "lora_ga/llama2": LLAMA2
    | {
        "init.direction": "LoRA-GA",
        "model.learning_rate": 2e-5,
        "evaluation.temperature": 0.8,
        "evaluation.top_p": 0.95,
    },
    "pissa/table2": {
        "dataset.name": "meta_math",
        "dataset.train_rows": 100_000,
        "dataset.test_benchmark": "gsm8k",
        "dataset.loss_on": "response",
        "model.name": "meta-llama/Llama-2-7b-hf",
        "model.bf16": False,
        "model.learning_rate": 2e-5,
        "model.schedule": "cosine",
        "model.warmup_steps": 0.03,
        "model.epochs": 1,
        "model.real_batch_size": 128,
        "model.max_length": 512,
        "model.weight_decay": 0,
        "peft.lora_r": 128,
        "peft.lora_alpha": 128,
        "peft.use_rslora": False,
        "peft.lora_dropout": 0,
        "peft.lora_target_modules": "all",
        "init.direction": "PiSSA",
        "optimizer.name": "adamw",
    },
    "peft/metamathqa": {
        "seed": 0,
        "dataset.name": "meta_math",
        "dataset.subset": "full",
        "dataset.train_rows": 20_000,
        "dataset.test_benchmark": "gsm8k",
        "dataset.test_rows": None,
        "dataset.max_new_tokens": 300,
        "model.name": "meta-llama/Llama-3.2-3B",
        "model.bf16": True,
        "model.learning_rate": 1e-4,
        "model.schedule": "cosine",
        "model.max_steps": 5000,
        "model.real_batch_size": 4,
        "model.max_length": 768,
        "model.weight_decay": 0.1,
        "model.max_grad_norm": 1,
        "peft.lora_r": 32,
        "peft.lora_alpha": 64,
        "peft.use_rslora": False,
        "peft.lora_target_modules": "qv",
        "init.direction": "LoRA",
        "optimizer.name": "adamw",
    },
    "riemannian/table1_settings": {
        "seed": 110,
        "model.learning_rate": 8e-4,
        "model.schedule": "linear",
        "model.warmup_steps": 500,
        "model.epochs": 5,
        "model.real_batch_size": 8,
        "model.weight_decay": 0.01,
        "peft.lora_r": 4,
        "peft.lora_alpha": 32,
        "peft.lora_dropout": 0.1,
        "init.direction": "LoRA",
        "optimizer.name": "preconditioned_adamw",
        "optimizer.betas": [0.7, 0.8],
        "optimizer.damping": 1e-6,
    },
    "riemannian/table2": MISTRAL | {"optimizer.damping": 1e-6},
} | {
    f"riemannian/table2_{task}": MISTRAL
    | {"dataset.name": task, "optimizer.damping": damping, "model.learning_rate": rate}
    for task, (damping, rate) in MISTRAL_TASKS.items()
}

CODE = ("dataset=code_feedback", "evaluation.allow_code_execution=true")
LORA = ("init=lora", "peft.use_rslora=false")
# The commands in the headers: preset, overrides, and the row and column of the published table
# whose number has to stand beside such a run.
ROWS = [
    ("lora_one/table2", ("init=lora", "dataset=mnli"), "LoRA", "MNLI"),
    ("lora_one/table2", ("init=lora", "optimizer=loraplus"), "LoRA+", "CoLA"),
    ("lora_one/table2", ("init=lora", "optimizer=preconditioned_adamw"), "P-LoRA", "CoLA"),
    ("lora_one/table2", ("init=pissa", "dataset=sst2"), "PiSSA", "SST-2"),
    ("lora_one/table2", ("init=lora_ga", "dataset=qnli"), "LoRA-GA", "QNLI"),
    ("lora_one/table2", ("dataset=mrpc",), "LoRA-One", "MRPC"),
    ("lora_one/table2_start", ("init=lora",), "pre-trained", "CoLA"),
    ("lora_one/table2_start", ("dataset=sst2",), "spectral initialisation only", "SST-2"),
    ("lora_one/table3", ("init=lora",), "LoRA", "MetaMathQA-100K: GSM8K"),
    ("lora_one/table3", ("init=lora_ga", "dataset=alpaca"), "LoRA-GA", "Alpaca: MMLU"),
    ("lora_one/table3", CODE, "LoRA-One", "Code-Feedback-100K: HumanEval pass@1"),
    ("lora_one/figure5", ("init=lora",), "LoRA", "epoch 4"),
    ("lora_one/figure5", ("init=lora", "optimizer=loraplus"), "LoRA+", "epoch 4"),
    ("lora_one/figure5", ("init=lora_ga",), "LoRA-GA", "epoch 4"),
    ("lora_one/figure5", (), "LoRA-One", "epoch 4"),
    ("lora_ga/glue", ("init=lora", "peft=full_ft"), "Full FT", "CoLA"),
    ("lora_ga/glue", LORA, "LoRA", "CoLA"),
    ("lora_ga/glue", ("init=pissa", "peft.use_rslora=false"), "PiSSA", "CoLA"),
    ("lora_ga/glue", ("init=lora",), "rsLoRA", "CoLA"),
    ("lora_ga/glue", (*LORA, "optimizer=loraplus"), "LoRA+", "CoLA"),
    ("lora_ga/glue", (*LORA, "peft=dora"), "DoRA", "CoLA"),
    ("lora_ga/glue", ("init=lora", "peft=adalora"), "AdaLoRA", "CoLA"),
    ("lora_ga/glue", (), "LoRA-GA", "CoLA"),
    ("lora_ga/llama2", LORA, "LoRA", "MetaMathQA-100K: GSM8K"),
    ("lora_ga/llama2", (*LORA, "peft=dora"), "DoRA", "MetaMathQA-100K: GSM8K"),
    ("lora_ga/llama2", ("init=lora", "peft=adalora"), "AdaLoRA", "MetaMathQA-100K: GSM8K"),
    ("lora_ga/llama2", ("peft.lora_r=128",), "LoRA-GA, r = 128", "MetaMathQA-100K: GSM8K"),
    ("lora_ga/llama2", CODE, "LoRA-GA", "Code-Feedback-100K: HumanEval pass@1"),
    ("pissa/table2", ("init=lora",), "Llama-2-7B, LoRA (kaiming)", "GSM8K"),
    ("pissa/table2", ("init=lora", "peft=full_ft"), "Llama-2-7B, full FT", "GSM8K"),
    ("pissa/table2", ("dataset.test_benchmark=math",), "Llama-2-7B, PiSSA", "MATH"),
    ("pissa/table2", ("model=mistral",), "Mistral-7B, PiSSA", "GSM8K"),
    ("pissa/table2", ("model=gemma", *CODE), "Gemma-7B, PiSSA", "HumanEval"),
    ("peft/metamathqa", (), "LoRA, r = 32", "GSM8K"),
    ("peft/metamathqa", ("peft.lora_r=64", "peft.lora_alpha=128"), "LoRA, r = 64", "GSM8K"),
    (
        "peft/metamathqa",
        ("peft.lora_r=64", "peft.lora_alpha=64", "peft.use_rslora=true"),
        "rsLoRA, r = 64",
        "GSM8K",
    ),
    (
        "peft/metamathqa",
        (
            *("peft.lora_r=10", "peft.lora_alpha=20"),
            "peft.lora_target_modules=[gate_proj,up_proj,down_proj]",
        ),
        "LoRA, r = 10, MLP",
        "GSM8K",
    ),
    ("peft/metamathqa", ("peft=dora",), "DoRA, r = 32", "GSM8K"),
    ("peft/metamathqa", ("optimizer=lorafa",), "LoRA-FA, r = 32", "GSM8K"),
    ("peft/metamathqa", ("peft=full_ft", "model.learning_rate=1e-5"), "full fine-tuning", "GSM8K"),
]

# Trained parameters in millions, as PEFT's results have them (section "trainable M").
PEFT_TRAINABLE = [
    ((), 9.18),
    (("peft.lora_r=64", "peft.lora_alpha=128"), 18.35),
    (("peft.lora_r=10", "peft.lora_target_modules=[gate_proj,up_proj,down_proj]"), 9.46),
    (("peft=dora",), 9.29),
    (("peft=full_ft",), 3212.7),
]


def facts(config: Config) -> dict[str, Any]:
    """Flatten to ``section.key``, with the method, as reports compare runs with recipes."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        parts = [flat(inner, f"{prefix}.{key}" if prefix else key) for key, inner in value.items()]
        return {key: inner for part in parts for key, inner in part.items()}

    return flat(config.model_dump()) | {"method": config.method}


def test_every_preset_is_in_the_table_of_settings():
    assert sorted(SETTINGS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_has_the_published_settings(compose, name):
    composed = facts(compose(f"experiment={name}"))
    assert {key: composed[key] for key in SETTINGS[name]} == SETTINGS[name]


@pytest.mark.parametrize(("name", "overrides", "row", "column"), ROWS)
def test_a_published_number_stands_beside_the_run_of_its_command(
    compose, name, overrides, row, column
):
    config = compose(f"experiment={name}", *overrides)
    found = [n for n in numbers(load(), name) if (n.row, n.column) == (row, column)]
    assert [mismatches(number, facts(config)) for number in found] == [[]]


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_a_reader_has_to_know(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n")
    if name.startswith("riemannian/table2_"):
        return  # one task of riemannian/table2, which says it all
    for label in ("Source", "Run", "Expect", "Hardware"):
        assert f"\n# {label} " in text
    assert f"experiment={name}" in text


def commands(name: str) -> list[list[str]]:
    """Return the overrides of every ``run_exp.py`` command in a preset's header."""
    text = (FOLDER / f"{name}.yaml").read_text()
    joined = re.sub(r"\\\n#\s*", "", text)
    found = re.findall(r"python run_exp\.py (?:-m )?(.+)", joined)
    return [shlex.split(command, comments=True) for command in found]


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_in_the_commands_of_a_header_composes(compose, name):
    for overrides in commands(name):
        # Instead of the whole product, which has a hundred points: each value at least once.
        swept = [
            [f"{key}={value}" for value in ([values] if "[" in values else values.split(","))]
            for key, _, values in (override.partition("=") for override in overrides)
        ]
        for at in range(max(map(len, swept))):
            compose(*(choices[at % len(choices)] for choices in swept))


def test_the_commands_of_a_header_are_found():
    assert commands("lora_one/table3")[1] == [
        *("experiment=lora_one/table3", "init=lora,lora_ga,lora_one", "dataset=code_feedback"),
        "evaluation.allow_code_execution=true",
    ]


def test_every_preset_has_a_row_in_the_documentation():
    text = (ROOT / "docs" / "experiments.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in text] == []


def test_dry_run_of_every_preset_needs_no_network(compose, monkeypatch, capsys):
    def refuse(*_: Any) -> None:
        raise AssertionError("a dry run asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    code = compose("experiment=lora_one/table3", *CODE)
    show_plan([code, *(compose(f"experiment={name}") for name in NAMES)])
    plan = capsys.readouterr().out
    assert "3,125 steps of 32 rows" in plan  # 100,000 rows
    assert "782 steps of 128 rows" in plan
    assert "5,000 steps of 4 rows" in plan


@pytest.mark.parametrize(("overrides", "millions"), PEFT_TRAINABLE)
def test_as_many_parameters_are_trained_as_peft_reports(compose, overrides, millions):
    outlook = foresee(compose("experiment=peft/metamathqa", *overrides))
    assert outlook.trainable / 1e6 == pytest.approx(millions, abs=0.05 if millions > 1e3 else 0.005)


def test_gemma_has_its_published_number_of_parameters(compose):
    assert foresee(compose("model=gemma", "dataset=gsm8k")).total == 8_537_680_896


def test_the_command_line_wins_over_the_preset(compose):
    config = compose(
        *("experiment=lora_one/table3", "dataset=gsm8k", "model=t5base", "init.direction=LoRA-GA"),
        *("optimizer=riemannian", "peft=qv", "model.learning_rate=1e-3", "++peft.lora_r=4"),
        *("init.stable_gamma=2", "seed=5"),
    )
    assert config.dataset.name == "gsm8k"
    assert config.model.name == "google-t5/t5-base"
    assert config.model.learning_rate == 1e-3
    assert config.model.max_length == 1024  # the preset wins over the group's file
    assert (config.init.direction, config.init.stable_gamma) == ("LoRA-GA", 2)
    assert config.optimizer.name == "riemannian"
    assert (config.peft.lora_target_modules, config.peft.lora_r) == ("qv", 4)
    assert config.seed == config.dataset.seed == 5


def test_preparing_a_preset_takes_its_name():
    given = ["-m", "experiment=lora_one/table3", "smoke=embedded", "init=lora,lora_ga", "seed=0,1"]
    wanted = "-m experiment=lora_one/table3 smoke=embedded seed=0,1"
    assert prepare_command(given) == f"python scripts/prepare.py {wanted}"


@pytest.mark.parametrize("spelling", ["experiment=", "+experiment=", "++experiment="])
def test_official_spellings_work_beside_a_preset(compose, spelling):
    config = compose(f"{spelling}lora_ga/llama2", "++dataset_name=code_feedback")
    assert config.dataset.name == "code_feedback"
    assert config.model.name == "meta-llama/Llama-2-7b-hf"  # the preset's, not the benchmark's


def test_a_sweep_may_vary_preset_and_method():
    with composer(ROOT / "conf"):
        points, _ = expand(
            ["experiment=lora_ga/glue,lora_one/table3", "init=lora,lora_one", "seed=0,1"]
        )
    assert {(p.config.model.name, p.config.method, p.config.seed) for p in points} == {
        (model, method, seed)
        for model in ("google-t5/t5-base", "meta-llama/Llama-2-7b-hf")
        for method in ("lora", "lora_one")
        for seed in (0, 1)
    }


def test_a_preset_and_the_same_values_by_hand_are_one_run(compose):
    by_hand = compose(
        *("dataset=meta_math", "model=llama", "init=lora_one", "seed=9"),
        *("model.learning_rate=2e-4", "model.schedule=linear", "model.warmup_steps=100"),
    )
    assert run_id(compose("experiment=lora_one/table3")) == run_id(by_hand)
    assert run_id(compose("experiment=lora_one/table4")) == run_id(by_hand)


def test_the_two_published_pairs_are_two_runs(compose):
    pairs = [compose(f"experiment=lora_one/table3{end}") for end in ("", "_lr2e5_gamma64")]
    assert [(p.model.learning_rate, p.init.stable_gamma) for p in pairs] == [
        (2e-4, 128),
        (2e-5, 64),
    ]
    assert all(run_id(one) != run_id(other) for one, other in pairwise(pairs))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=lora_one/tabel3", "Did you mean 'lora_one/table3'? Valid: fair/arithmetic, "),
        ("experiment=lora_one", "experiment=lora_one: no such choice."),
        ("smoke=true", "smoke=true: no such choice. Valid: embedded."),
        ("init=True", "init=True: no such choice. Valid: corda, default, eva, "),
    ],
)
def test_a_wrong_choice_is_named_with_the_valid_ones(compose, override, message):
    with pytest.raises(InputError) as error:
        compose(override)
    assert message in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_sets_no_option_of_one_benchmark(name):
    """Else neither another ``dataset=`` nor the smoke form could be given with it."""
    given = OmegaConf.load(FOLDER / f"{name}.yaml").get("dataset", {})
    assert set(given) <= set(DatasetConfig.model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_form_is_the_same_recipe_on_the_embedded_model(compose, name):
    full, smoke = (facts(compose(f"experiment={name}", *o)) for o in ([], ["smoke=embedded"]))
    assert (smoke["model.name"], smoke["dataset.name"]) == ("data/tiny_llama", "arithmetic")
    assert (smoke["model.max_steps"], smoke["dataset.test_rows"]) == (8, 16)
    changed = {key for key in full if full[key] != smoke.get(key)}
    kept = ("init.", "peft.", "optimizer.", "train", "seed", "evaluation.", "method")
    assert [key for key in changed if key.startswith(kept)] == []
    for key in ("learning_rate", "real_batch_size", "weight_decay", "bf16"):
        assert smoke[f"model.{key}"] == full[f"model.{key}"]
    assert compose(f"experiment={name}", "smoke=embedded", "model.max_steps=2").model.max_steps == 2


@pytest.mark.slow
def test_a_smoke_form_runs(tmp_path):
    command = [str(ROOT / "run_exp.py"), "experiment=lora_one/table3", "smoke=embedded"]
    answer = subprocess.run(
        [sys.executable, *command, f"output_dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    (folder,) = tmp_path.glob("arithmetic-*")
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["method"]) == ("finished", "lora_one")
    assert (record["train"]["steps"], record["metrics"]["n"]) == (8, 16)
