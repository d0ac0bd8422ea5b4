"""A model folder that does not hold together: one clear message, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from encoders import save_roberta
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_one.errors import InputError
from lora_one.harness.dry_run import foresee
from lora_one.harness.models.base import find_base, load_base, load_tokenizer

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(copy_of, llama_folder) -> Path:
    return copy_of(llama_folder)


@pytest.fixture
def refused(small, run):
    """The message of a run that ends before anything is written."""

    def message(folder: Path, *overrides: str) -> str:
        config = small(f"model.name={folder}", *overrides)
        with pytest.raises(InputError) as raised:
            run(config)
        assert not Path(config.output_dir).exists()
        text = str(raised.value)
        assert "\n" not in text
        assert len(text) < 500
        return text

    return message


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_a_tensor_is_not_filled_at_random(folder, refused):
    change(folder, lambda tensors: tensors.pop(UP))
    assert f"lacks 1 of the tensors of LlamaForCausalLM: {UP}" in refused(folder)


def test_a_tied_head_without_its_embedding_is_missing(folder, refused):
    change(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight" in refused(folder)


def test_a_classifier_is_no_language_model(refused, tmp_path, tokenizer):
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    message = refused(tmp_path / "model")
    assert "lm_head" in message
    assert "saved as RobertaForSequenceClassification" in message


@pytest.mark.parametrize("bf16", [True, False])
def test_tied_models_models_with_buffers_and_shards_lack_nothing(
    small, llama_folder, t5_folder, tokenizer, tmp_path, bf16
):
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2", max_shard_size="5KB")
    assert len(list((tmp_path / "gpt2").glob("*.safetensors"))) > 1
    for folder in (llama_folder, t5_folder, tmp_path / "gpt2"):
        model = small(f"model.name={folder}").model
        loaded = load_base(
            find_base(model), model, CPU, dtype := torch.bfloat16 if bf16 else torch.float32
        )
        assert loaded.dtype == dtype
        assert all(p.isfinite().all() and p.device == CPU for p in loaded.parameters())


def test_only_the_head_of_a_classifier_starts_at_random(small, folder):
    from lora_one.tasks.registry import TASKS

    model = small(f"model.name={folder}", "model.type=SequenceClassification").model
    base = find_base(model, task=TASKS["sst2"])
    assert isinstance(load_base(base, model, CPU, torch.float32), LlamaForSequenceClassification)
    change(folder, lambda tensors: tensors.pop(UP))
    with pytest.raises(InputError, match="lacks 1 of the tensors"):
        find_base(model, task=TASKS["sst2"])
    with pytest.raises(InputError, match="lacks 1 of the tensors"):
        load_base(base, model, CPU, torch.float32)


def test_a_tensor_of_another_shape_is_named_with_both(folder, refused):
    change(folder, lambda tensors: tensors.update({UP: torch.zeros(40, 32)}))
    message = refused(folder)
    assert f"{UP} is 40 x 32, expected 48 x 32" in message
    assert "classification" not in message


def test_words_beyond_the_embedding_are_refused(folder, refused, tokenizer):
    larger = AutoTokenizer.from_pretrained(folder)
    larger.add_tokens(["shells", "drawers"])
    larger.save_pretrained(folder)
    rows = len(tokenizer)
    message = refused(folder)
    assert f"tokens (2) beyond the {rows} rows" in message
    assert f"'shells' with id {rows}" in message


def test_a_padding_token_beyond_the_embedding_is_refused(folder, refused):
    larger = AutoTokenizer.from_pretrained(folder)
    larger.add_special_tokens({"pad_token": "<new_pad>"})
    larger.save_pretrained(folder)
    assert "'<new_pad>'" in refused(folder)


def test_a_special_token_of_no_text_may_lie_beyond_the_embedding(small, folder):
    larger = AutoTokenizer.from_pretrained(folder)
    larger.add_special_tokens({"additional_special_tokens": ["<image>"]})
    larger.save_pretrained(folder)
    model = small(f"model.name={folder}").model
    base = find_base(model)
    assert len(load_tokenizer(base, model)) == base.config.vocab_size + 1


def test_a_type_that_does_not_fit_is_answered_with_those_that_do(
    refused, small, llama_folder, t5_folder
):
    llama = (llama_folder, "ConditionalGeneration", "Valid for it: CausalLM, SequenceClass")
    t5 = (t5_folder, "CausalLM", "Valid for it: ConditionalGeneration, SequenceClass")
    for folder, wrong, valid in (llama, t5):
        assert valid in refused(folder, f"model.type={wrong}")
        with pytest.raises(InputError, match=valid):
            foresee(small(f"model.name={folder}", f"model.type={wrong}", "dry_run=true"))


def test_an_encoder_is_not_trained_to_write(refused, small, tmp_path):
    folder = save_roberta(tmp_path / "roberta", ["it is red"])
    for choice in ("peft=all", "peft=full_ft", "train=none"):
        assert "an encoder (roberta)" in refused(folder, choice, "init=lora")
    with pytest.raises(InputError, match=r"Add model\.type=Seq"):
        foresee(small(f"model.name={folder}", "dry_run=true"))


@pytest.mark.parametrize("choice", [["init=pissa"], ["init=lora", "peft=full_ft"]])
def test_packed_weights_are_left_alone(folder, refused, small, choice):
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    assert "is quantised (bitsandbytes), and " in refused(folder, *choice)
    with pytest.raises(InputError, match="is quantised"):
        foresee(small(f"model.name={folder}", *choice, "dry_run=true"))


@pytest.mark.parametrize("text", ['{"model_type"', '{"model_type": "nosuch"}'])
def test_a_config_that_cannot_be_used_is_blamed_on_the_folder(folder, refused, text):
    (folder / "config.json").write_text(text)
    message = refused(folder)
    assert "config.json cannot be used" in message
    assert "hub" not in message


def test_a_folder_without_a_tokenizer_is_said_to_have_none(refused, llama_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(llama_folder, bare, ignore=shutil.ignore_patterns("tok*"))
    assert "the folder has no tokenizer" in refused(bare)
