"""A stored adapter and its base become one folder that needs no PEFT: merged, saved, read back."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from lora_one.adapters.merge import (
    check_same_logits,
    check_unquantised,
    logits_of,
    merge_adapter,
)
from lora_one.adapters.stored import PREFIX, UNCHECKED_BY_PEFT, StoredAdapter
from lora_one.errors import InputError, nearest
from lora_one.layers import lora_layers
from lora_one.snapshots import fetch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the logits, relative to the largest: weights rounded to 24, 11 and 8 bits.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

PROBE_ROWS, PROBE_TOKENS = 2, 16

_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class MergeReport:
    """A merged model.

    Attributes:
        base: What it was merged into.
        layers: How many layers changed.
        dtype: Of the weights.
        logit_difference: Between the base with the adapter in fp32 and the folder that was read
            back, the largest over the probe, relative to the largest logit.
        tokenizer: Names of the files that were copied.
    """

    base: str
    layers: int
    dtype: torch.dtype
    logit_difference: float
    tokenizer: list[str]


def merge_folder(
    adapter: StoredAdapter, out: Path, *, base: str | None = None, dtype: torch.dtype | None = None
) -> MergeReport:
    """Merge in fp32, save as safetensors, and compare what was saved with base and adapter.

    Args:
        adapter: As it was read.
        out: A folder that is not there yet; it is there whole or not at all.
        base: Local folder or hub id; None is what the adapter's settings say.
        dtype: Of the merged weights; None is the dtype of the base's.

    Raises:
        InputError: no such base, one that the adapter does not fit or that lacks weights, weights
            in no safetensors, or an ``out`` that is there or cannot be made.
        RuntimeError: the saved model gives other logits.
    """
    name = base or adapter.config.get("base_model_name_or_path")
    if not name:
        raise InputError(f"{adapter.path} does not say what its base model is: give --base.")
    revision = None if base else adapter.config.get("revision")
    with _folder_beside(out) as partial:
        folder = _base_folder(name, revision)
        model = _load(adapter, name, revision)
        dtype = dtype or model.dtype
        if dtype not in TOLERANCES:
            raise InputError(f"the base is in {dtype}: give --dtype, one of {', '.join(DTYPES)}.")
        peft_model = _attach(adapter, model, name)
        check_unquantised(lora_layers(peft_model))
        peft_model.float()
        probe = _probe(model.config)
        before = logits_of(peft_model, probe)
        merged = merge_adapter(peft_model, dtype=dtype)
        merged.save_pretrained(partial)
        copied = _copy_tokenizer([adapter.path, folder], partial)
        reread = type(merged).from_pretrained(partial, dtype=dtype, use_safetensors=True).eval()
        difference = check_same_logits(before, logits_of(reread, probe), TOLERANCES[dtype])
        partial.rename(out)
    return MergeReport(name, len(adapter.layers), dtype, difference, copied)


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """Make the folder that becomes ``out``, first of all: a long merge must not end in a typo."""
    partial = out.parent / f".{out.name}.{os.getpid()}.new"
    try:
        if out.exists():
            raise InputError(f"{out} exists already; choose another folder.")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}); choose another folder."
        ) from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _base_folder(name: str, revision: str | None) -> Path:
    """Return where the base's small files lie, fetched from the hub unless they are here."""
    if Path(name).is_dir():
        return Path(name)
    return fetch(name, "model", revision, ["config.json", *_TOKENIZER]).folder


def _load(adapter: StoredAdapter, name: str, revision: str | None) -> PreTrainedModel:
    """Load the base with the head that the adapter was made for, safetensors only."""
    task = adapter.config.get("task_type")
    if task is not None and task not in _CLASSES:
        raise InputError(
            f"the adapter is for {task}; expected {', '.join(_CLASSES)}. Load both yourself and "
            "call lora_one.adapters.merge.merge_adapter."
        )
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        if task == "SEQ_CLS":
            config.num_labels = _labels(adapter, config)
        kind = _CLASSES.get(task) or config.architectures[0]
        model, loaded = getattr(transformers, kind).from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            # Refused below, with the first name.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the base model {name} cannot be loaded: {reason}") from None
    if getattr(model, "peft_config", None):
        raise InputError(
            f"beside the weights of the base model {name} lies another adapter "
            "(adapter_config.json), which transformers puts on it: give --base without one."
        )
    # What the adapter brings in full, such as a trained head, hubs' bases lack.
    brought = {key.removeprefix(PREFIX) for key in adapter.others}
    if missing := sorted(set(loaded["missing_keys"]) - brought):
        raise InputError(
            f"the base model {name} lacks {len(missing)} of its weights, first '{missing[0]}', "
            "which would be random; expected a whole checkpoint: get it again, or give --base."
        )
    other = sorted(entry for entry in loaded["mismatched_keys"] if entry[0] not in brought)
    if other:
        key, found, expected = other[0]
        raise InputError(
            f"the weights of the base model {name} have other shapes than its config.json says, "
            f"first '{key}': {tuple(found)}, expected {tuple(expected)}. Get it again, or give "
            "--base."
        )
    return model


def _labels(adapter: StoredAdapter, config: PretrainedConfig) -> int:
    """Return the number of outputs of the head that the adapter brings, else of the base's."""
    heads = [tensor for key, tensor in adapter.others.items() if key.endswith(_HEADS)]
    return heads[0].shape[0] if heads else config.num_labels


def _attach(adapter: StoredAdapter, model: PreTrainedModel, name: str) -> PeftModel:
    """Put the adapter on the base, and check that every layer has found its place."""
    try:
        peft_model = PeftModel.from_pretrained(model, str(adapter.path))
    except (RuntimeError, *UNCHECKED_BY_PEFT) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{adapter.path} does not fit the base model {name}: {reason}") from None
    present = set(lora_layers(peft_model))
    stored = {layer.name for layer in adapter.layers}
    if odd := sorted(present ^ stored):
        side = "model" if odd[0] in present else "adapter"
        raise InputError(
            f"{adapter.path} does not fit the base model {name}: '{odd[0]}' is in the {side} "
            f"only.{nearest(odd[0], stored if odd[0] in present else present)}"
        )
    return peft_model


def _probe(config: PretrainedConfig) -> dict[str, Tensor]:
    """Return token ids drawn with seed 0, for an encoder and a decoder where there are both."""
    shape, generator = (PROBE_ROWS, PROBE_TOKENS), torch.Generator().manual_seed(0)
    ids = torch.randint(config.get_text_config().vocab_size, shape, generator=generator)
    probe: dict[str, Any] = {"input_ids": ids}
    if config.is_encoder_decoder:
        probe["decoder_input_ids"] = ids
    return probe


def _copy_tokenizer(folders: list[Path], out: Path) -> list[str]:
    """Copy the tokenizer's files of the first folder that has any, as they are."""
    for folder in folders:
        names = [name for name in _TOKENIZER if (folder / name).is_file()]
        for name in names:
            shutil.copy(folder / name, out / name)
        if names:
            return names
    return []
