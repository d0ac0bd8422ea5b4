"""An adapter that is there already (``evaluate.adapter=``): used as it is, or refused."""

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from lora_one.errors import InputError
from lora_one.harness.config.given_adapter import read_adapter
from lora_one.harness.config.published import translate
from lora_one.harness.models.base import base_dtype, has_bf16
from lora_one.harness.records.folder import run_id

from .evaluated import predictions
from .long_run import folder_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("peft", [[], ["peft=full_ft", "init=lora"]])
def test_the_base_under_a_given_adapter_is_frozen_whatever_peft_says(small, adapter, peft):
    config = small(f"evaluate.adapter={adapter}", "model.bf16=true", *peft)
    assert base_dtype(config) == (torch.bfloat16 if has_bf16() else torch.float32)
    assert run_id(config) == run_id(small(f"evaluate.adapter={adapter}", "model.bf16=true"))


def test_an_adapter_that_is_there_is_evaluated_as_it_is(small, run, adapter):
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


def test_what_a_run_exports_evaluates_to_what_the_run_says(small, run):
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
