"""The hand-off to lm-evaluation-harness: same choices as ours, results beside the run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_one
from lora_one.errors import InputError
from lora_one.evaluation import choice_log_probabilities
from lora_one.evaluation.lm_eval import (
    Settings,
    Target,
    command,
    evaluate,
    find_target,
    main,
    write,
)

BASE = Path(__file__).resolve().parents[2] / "data" / "tiny_llama"

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["2", "3", "4", "5"]
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
GENERATED = """
task: tiny_generated
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Q:"], do_sample: false, max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""
ROWS = [
    {"prompt": f"Q: Tom has {a} apples and gets {b} more. How many?\nA:", "answer": 1 + (a + b) % 3}
    for a in range(3)
    for b in range(4)
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A random adapter, large enough to change the answers."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    lora_one.export_adapter(model, folder)
    return folder


@pytest.fixture
def tasks(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    for name, text in (("choices", CHOICES), ("generated", GENERATED)):
        (tmp_path / f"tiny_{name}.yaml").write_text(text.format(file=file))
    return tmp_path


def _our_accuracy(model):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    found = choice_log_probabilities(
        model,
        tokenizer,
        [row["prompt"] for row in ROWS],
        [[" 2", " 3", " 4", " 5"]] * len(ROWS),
        architecture="causal",
        batch_size=4,
    )
    best = [max(range(4), key=scores.__getitem__) for scores in found]
    return sum(b == row["answer"] for b, row in zip(best, ROWS, strict=True)) / len(ROWS), best


@pytest.mark.slow
def test_lm_eval_scores_our_adapter_as_we_do(adapter, tasks, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    target = find_target(adapter, base=str(BASE))
    settings = Settings(
        ["tiny_choices", "tiny_generated"], batch_size="4", device="cpu", include_path=tasks
    )
    facts = evaluate(target, settings)

    base = AutoModelForCausalLM.from_pretrained(BASE)
    _, answers_of_base = _our_accuracy(base)
    ours, answers = _our_accuracy(PeftModel.from_pretrained(base, adapter))
    assert answers != answers_of_base  # or the test could not tell whether the adapter is there
    assert facts["results"]["tiny_choices"]["acc,none"] == pytest.approx(ours)
    assert "exact_match,none" in facts["results"]["tiny_generated"]
    assert facts["n-samples"]["tiny_choices"]["effective"] == len(ROWS)

    assert json.loads((adapter / "lm_eval.json").read_text()) == {"evaluations": [facts]}
    with pytest.raises(InputError, match="no task tiny_choice;"):
        evaluate(target, Settings(["tiny_choice"], include_path=tasks))


def test_results_of_the_same_command_are_replaced_and_others_kept(tmp_path):
    for name, value in (("a", 1), ("b", 2), ("a", 3)):
        write(tmp_path / "lm_eval.json", {"command": name, "results": value})
    written = json.loads((tmp_path / "lm_eval.json").read_text())["evaluations"]
    assert [(entry["command"], entry["results"]) for entry in written] == [("b", 2), ("a", 3)]


def _run_folder(tmp_path, **model):
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    lines = [f"  {key}: {json.dumps(value)}" for key, value in model.items()]
    (tmp_path / "config.yaml").write_text("\n".join(["model:", *lines]))
    return tmp_path


def test_a_run_folder_says_its_base_dtype_and_revision(tmp_path):
    folder = _run_folder(
        tmp_path, name="me/base", bf16=True, revision="v1", trust_remote_code=False
    )
    with pytest.raises(InputError, match=r"neither adapter/ nor model/.*evaluate\.adapter"):
        find_target(folder)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    target = Target("me/base", folder / "adapter", folder, "v1", "bfloat16")
    assert find_target(folder) == find_target(folder / "adapter") == target
    assert command(target, Settings(["gsm8k_cot", "mmlu"], num_fewshot=5, limit=100)) == (
        "lm_eval run --model hf --model_args "
        f"pretrained=me/base,dtype=bfloat16,peft={folder}/adapter,revision=v1 "
        "--tasks gsm8k_cot,mmlu --batch_size auto --num_fewshot 5 --limit 100"
    )


def test_code_of_a_base_runs_where_the_command_line_allows_it_and_not_because_a_folder_says_so(
    tmp_path, capsys
):
    folder = _run_folder(tmp_path, name="me/base", bf16=False, trust_remote_code=True)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for path in (folder, folder / "adapter"):
        assert main([str(path), "--tasks", "gsm8k_cot", "--print"]) == 2
        assert "add --trust_remote_code" in capsys.readouterr().err
    assert main([str(folder), "--tasks", "gsm8k_cot", "--print", "--trust_remote_code"]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out


@pytest.mark.parametrize("record", ['{"status": "running"}', '{"status": "failed"}', "{}", "{"])
def test_what_an_unfinished_run_has_left_is_refused(tmp_path, record):
    folder = _run_folder(tmp_path, name="me/base", bf16=False)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    assert find_target(folder).adapter == folder / "adapter"
    (folder / "run.json").write_text(record)
    for path in (folder, folder / "adapter"):
        with pytest.raises(InputError, match=r"not finished|cannot be read"):
            find_target(path)


def test_a_model_trained_in_full_is_evaluated_itself(tmp_path):
    folder = _run_folder(tmp_path, name="me/base", bf16=False)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    assert find_target(folder) == Target(str(folder / "model"), None, folder)


def test_an_adapter_of_its_own_names_its_base(adapter, tmp_path):
    assert find_target(adapter, base="here").adapter == adapter
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}')
    assert find_target(tmp_path, dtype="bfloat16") == Target(
        "me/base", tmp_path, tmp_path, dtype="bfloat16"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="give --base"):
        find_target(tmp_path)


def test_the_command_line_prints_the_command_and_refuses_other_folders(tmp_path, capsys):
    folder = _run_folder(tmp_path, name="me/base", bf16=False)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    assert main([str(folder), "--tasks", "gsm8k_cot", "--print"]) == 0
    assert capsys.readouterr().out.startswith("lm_eval run --model hf --model_args pretrained=me")
    assert main([str(tmp_path / "other"), "--tasks", "gsm8k_cot"]) == 2
    assert "neither a run folder" in capsys.readouterr().err


def test_the_module_runs_without_lm_eval_being_imported_for_the_command(tmp_path):
    folder = _run_folder(tmp_path, name="a,b", bf16=False)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    ran = subprocess.run(
        [sys.executable, "-m", "lora_one.evaluation.lm_eval", folder, "--tasks", "x", "--print"],
        capture_output=True,
        text=True,
        cwd=BASE.parents[1],
    )
    assert ran.returncode == 2
    assert "cannot read a comma" in ran.stderr
