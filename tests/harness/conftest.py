"""Tiny random base models in Hugging Face folders, and a few rows in GSM8K's schema."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_one.harness.config.compose import compose_config, composer
from lora_one.harness.config.published import translate
from lora_one.harness.config.schema import Config

from .forks import Forks

ROOT = Path(__file__).parents[2]


def _save(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_llama")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return _save(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory, tokenizer) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(tmp_path_factory.mktemp("t5"), T5ForConditionalGeneration(config))


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory) -> Path:
    """A GSM8K folder made of the first embedded rows."""
    folder = tmp_path_factory.mktemp("rows")
    source = ROOT / "data" / "arithmetic"
    for split, count in (("train", 48), ("validation", 8), ("test", 6)):
        lines = (source / f"{split}.jsonl").read_text().splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def compose():
    """Compose a configuration as the command line would."""

    def from_overrides(*overrides: str) -> Config:
        with composer(ROOT / "conf"):
            return compose_config(translate(overrides)[0])

    return from_overrides


@pytest.fixture
def small(compose, llama_folder, rows_folder, tmp_path):
    """Compose a run of two steps on the tiny random Llama; further overrides win."""

    def from_overrides(*overrides: str) -> Config:
        return compose(
            f"model.name={llama_folder}",
            f"dataset.path={rows_folder}",
            f"output_dir={tmp_path / 'results'}",
            "dataset.max_new_tokens=4",
            "dataset.train_rows=16",
            "model.max_steps=2",
            "model.real_batch_size=8",
            "model.per_device_batch_size=4",
            "peft.lora_r=4",
            "evaluation.batch_size=8",
            *overrides,
        )

    return from_overrides


@pytest.fixture
def copy_of(tmp_path):
    """Copy a folder, to be spoilt by a test."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


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


@pytest.fixture
def run():
    from run_exp import run

    return run


@pytest.fixture
def read():
    """Read a JSON file of a run folder."""
    return lambda folder, name: json.loads((Path(folder) / name).read_text())


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """Start the command line many times, without importing torch each time."""
    parent = Forks(tmp_path_factory.mktemp("forks"))
    yield parent
    parent.close()
