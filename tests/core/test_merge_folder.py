"""Base and adapter become one folder that plain transformers reads, with the same logits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
)

from lora_one.adapters import merge_folder
from lora_one.adapters.command import main
from lora_one.adapters.stored import read_stored

from .tiny import TARGETS, adapted, batches_for, logits, perturb, tiny_gpt2, tiny_llama, tiny_t5


@pytest.fixture
def folders(tmp_path):
    """Save a base and an adapter for it; return their folders, a third, and the adapted model."""

    def save(model, **options):
        model.save_pretrained(tmp_path / "base")
        (tmp_path / "base" / "tokenizer.json").write_text("{}")
        (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"")
        peft_model = adapted(model, **options)
        perturb(peft_model, size=0.1)
        peft_model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
        settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(tmp_path / "base")
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
        return tmp_path / "a", tmp_path / "merged", peft_model

    return save


def largest(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    ("model", "options", "load"),
    [
        (tiny_llama, {"task_type": "CAUSAL_LM", "use_rslora": True}, AutoModelForCausalLM),
        (tiny_llama, {"use_dora": True, "modules_to_save": ["lm_head"]}, AutoModelForCausalLM),
        (tiny_llama, {"targets": ["embed_tokens"]}, AutoModelForCausalLM),
        (
            tiny_gpt2,
            {"task_type": "CAUSAL_LM", "targets": TARGETS["gpt2"], "fan_in_fan_out": True},
            AutoModelForCausalLM,
        ),
        (
            tiny_t5,
            {"task_type": "SEQ_2_SEQ_LM", "targets": TARGETS["t5"]},
            AutoModelForSeq2SeqLM,
        ),
    ],
)
def test_the_merged_folder_gives_the_adapted_models_logits(model, options, load, folders, capsys):
    adapter, out, peft_model = folders(model(), **options)
    capsys.readouterr()
    assert main(["merge", str(adapter), str(out)]) == 0
    merged = load.from_pretrained(out)
    batch = batches_for("t5" if model is tiny_t5 else "llama")[0]
    assert largest(logits(merged, batch), logits(peft_model, batch)) < 3e-5
    assert "tokenizer copied (1 files)" in capsys.readouterr().out
    assert (out / "tokenizer.json").read_text() == "{}"
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"]])
def test_tied_weights_come_apart_where_one_of_them_is_adapted(targets, folders):
    model = tiny_llama(tie_word_embeddings=True)
    adapter, out, peft_model = folders(model, targets=targets, task_type="CAUSAL_LM")
    assert main(["merge", str(adapter), str(out)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    batch = batches_for()[0]
    assert largest(logits(merged, batch), logits(peft_model, batch)) < 3e-5
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight


def test_a_classifiers_head_comes_from_the_adapter(folders, tmp_path):
    base = tiny_llama(pad_token_id=0)
    config = type(base.config)(**{**base.config.to_dict(), "num_labels": 5})
    classifier = LlamaForSequenceClassification(config).eval()
    classifier.model.load_state_dict(base.model.state_dict())
    adapter, out, peft_model = folders(classifier, task_type="SEQ_CLS")
    base.save_pretrained(tmp_path / "base")  # without a head, as hubs have it
    assert main(["merge", str(adapter), str(out)]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(out)
    assert merged.config.num_labels == 5
    batch = {"input_ids": batches_for()[0]["input_ids"]}
    assert largest(logits(merged, batch), logits(peft_model, batch)) < 3e-5


def test_dtype_is_that_of_the_base_or_as_asked(folders, tmp_path, capsys):
    adapter, out, _ = folders(tiny_llama().to(torch.bfloat16), task_type="CAUSAL_LM")
    stored = read_stored(adapter)
    report = merge_folder.merge_folder(stored, out)
    assert report.dtype == torch.bfloat16
    assert 0 < report.logit_difference < 0.1
    assert main(["merge", str(adapter), str(tmp_path / "b"), "--dtype", "float32"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == torch.float32


def test_a_merge_that_moves_the_logits_fails_and_leaves_nothing(folders, monkeypatch, capsys):
    adapter, out, _ = folders(tiny_llama(), task_type="CAUSAL_LM")
    tolerances = dict.fromkeys(merge_folder.TOLERANCES, 1e-9)
    monkeypatch.setattr(merge_folder, "TOLERANCES", tolerances)
    before = sorted(out.parent.iterdir())
    assert main(["merge", str(adapter), str(out), "--dtype", "bfloat16"]) == 1
    assert "failed: merging changed the logits by" in capsys.readouterr().err
    assert sorted(out.parent.iterdir()) == before


@pytest.mark.parametrize("offline", [False, True])
def test_what_cannot_be_merged_is_refused_in_one_message(
    offline, folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    adapter, out, _ = folders(tiny_llama(), task_type="CAUSAL_LM")
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def refused(message, *options, **changes):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
        capsys.readouterr()
        assert main(["merge", str(adapter), str(out), *map(str, options)]) == 2
        (err,) = capsys.readouterr().err.splitlines()
        assert err.startswith("error: ")
        assert message in err

    refused("give --base", base_model_name_or_path=None)
    refused("the adapter is for TOKEN_CLS; expected", task_type="TOKEN_CLS")
    for base in ("no such/base/at all", tmp_path / "none", "./none"):
        refused("neither a local folder nor the id of a model", "--base", base)
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "deeper")
    refused("'model.layers.2.mlp.down_proj' is in the model only", "--base", tmp_path / "deeper")
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "wider")
    refused("does not fit the base model", "--base", tmp_path / "wider")
    refused("does not fit the base model", modules_to_save=["lm_head"])
    both = shutil.copytree(tmp_path / "base", tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    refused("lies another adapter", "--base", both)
    lacking = tmp_path / "lacking"
    tiny_llama().save_pretrained(lacking)
    whole = load_file(lacking / "model.safetensors")
    absent = [key for key in whole if "layers.1.mlp" in key]
    save_file(
        {key: whole[key].clone() for key in whole if key not in absent},
        lacking / "model.safetensors",
        {"format": "pt"},
    )
    refused(
        "lacks 3 of its weights, first 'model.layers.1.mlp.down_proj.weight'", "--base", lacking
    )
    whole["model.norm.weight"] = torch.ones(16)
    save_file(whole, lacking / "model.safetensors", {"format": "pt"})
    refused("first 'model.norm.weight': (16,), expected (32,). Get it", "--base", lacking)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: v * float("nan") for k, v in weights.items()}, adapter / "adapter_model.safetensors"
    )
    refused("adapter 'default' cannot be merged: NaNs detected")
    (tmp_path / "base" / "model.safetensors").unlink()
    refused("cannot be loaded", "--base", tmp_path / "base")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    out.mkdir()
    refused("exists already")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "merged"
    refused("cannot be written (Not a directory); choose another folder")
