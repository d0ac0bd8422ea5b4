"""What a run leaves for others: a plain LoRA that PEFT loads onto the untouched base."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

import lora_one
from lora_one.evaluation.vllm_engine import fitting_rank
from lora_one.harness.config.schema import Config
from lora_one.harness.data.rows import Batch
from lora_one.harness.models.adapter import ADALORA_START
from lora_one.harness.models.base import Base, base_dtype, load_base
from lora_one.harness.records.folder import publish
from lora_one.numerics.methods import METHODS

# Above this size a second copy of the base model is not loaded only to check an export.
LARGEST_CHECKED_BASE = 2_000_000_000

# Relative to the largest logit, by the coarser dtype of base and factors. The two models add the
# same numbers in another order; a base in bfloat16 moreover rounds W - s B0 A0 to 8 bits, which its
# untouched twin has no part in, and factors in bfloat16 round what they add so.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


class ExportError(RuntimeError):
    """The exported adapter is not the trained model."""


def rehearse_export(
    config: Config, base: Base, model: nn.Module, folder: Path, probe: Batch
) -> None:
    """Export the untrained adapter, check it as after the training, and throw it away.

    An export that cannot work, or that the engine of the evaluation cannot take, fails here, before
    the hours of training and not after them.
    """
    if isinstance(model, PeftModel):
        rehearsal = folder / ".adapter_rehearsal"
        try:
            facts = _export_adapter(config, base, model, rehearsal, probe)
            if config.evaluation.engine == "vllm":  # ranks by energy are known only now
                fitting_rank(facts["rank_range"][1])
        finally:
            shutil.rmtree(rehearsal, ignore_errors=True)


def export(
    config: Config, base: Base, tokenizer: Any, model: Any, folder: Path, probe: Batch
) -> dict[str, Any]:
    """Write ``adapter/`` (or ``model/`` after full fine-tuning) and check it in place.

    Args:
        config: The run.
        base: The base model.
        tokenizer: Goes with a fully trained model.
        model: The trained model.
        folder: The run folder.
        probe: One batch, on which the reloaded adapter must give the trained model's logits.

    Returns:
        Facts for the record: path, rank, truncation error, and the largest difference of logits
        after a reload (None where the base is too large to be loaded twice).

    Raises:
        ExportError: if the reloaded adapter does not give the model's logits.
    """
    name = "adapter" if isinstance(model, PeftModel) else "model"
    # Nothing half written ever has the final name.
    partial = folder / f".{name}.partial"
    try:
        if isinstance(model, PeftModel):
            facts = _export_adapter(config, base, model, partial, probe)
        else:
            if hasattr(base.config, "use_cache"):
                # The Trainer has switched it off for good.
                model.config.use_cache = base.config.use_cache
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            facts = {"rank": None, "largest_logit_difference": None}
        publish(partial, folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"path": name} | facts


def _export_adapter(
    config: Config, base: Base, model: PeftModel, path: Path, probe: Batch
) -> dict[str, Any]:
    report = lora_one.export_adapter(model, path, rank=config.export.rank)
    difference = None
    if sum(p.numel() for p in model.parameters()) <= LARGEST_CHECKED_BASE:
        difference = _reload_difference(config, base, model, path, probe)
    return {
        "rank": report.rank,
        "rank_range": list(report.rank_range),
        "truncation_error": report.truncation_error,
        "largest_logit_difference": difference,
    }


@torch.no_grad()
def _reload_difference(
    config: Config, base: Base, model: PeftModel, adapter: Path, probe: Batch
) -> float:
    device, dtype = model.device, base_dtype(config)
    probe = {name: tensor.to(device) for name, tensor in probe.items() if name != "labels"}
    was_training = model.training
    trained = model.eval()(**probe).logits.float()
    model.train(was_training)
    untouched: PreTrainedModel = load_base(base, config.model, device, dtype)
    # In the dtype that was trained: PEFT would load bf16 factors as fp32, which round less.
    wide = config.init.dtype == "fp32"
    loaded = PeftModel.from_pretrained(untouched, adapter, autocast_adapter_dtype=wide)
    reloaded = loaded.eval()(**probe).logits.float()
    difference = float((trained - reloaded).abs().max())
    exact = config.export.rank is None
    coarser = dtype if wide else torch.bfloat16
    allowed = TOLERANCES[coarser] * max(1.0, float(trained.abs().max()))
    if exact and not difference <= allowed:
        raise ExportError(
            f"the exported adapter on a fresh base gives logits that differ by {difference:.2e}, "
            f"more than the {allowed:.2e} that rounding explains"
        )
    return difference


def expected_rank(config: Config) -> int:
    """Return the rank of the adapter that a run exports, of most layers where ranks differ."""
    if config.export.rank is not None:
        return config.export.rank
    if config.peft.adalora:
        return round(ADALORA_START * config.peft.lora_r)
    return config.peft.lora_r * (2 if METHODS[config.init.method].offset else 1)


def describe_rank(facts: dict[str, Any]) -> str:
    """Return ``rank 8``, or ``ranks 3 to 21`` where layers differ; facts as ``export`` returns."""
    low, high = facts["rank_range"]
    return f"rank {low}" if low == high else f"ranks {low} to {high}"
