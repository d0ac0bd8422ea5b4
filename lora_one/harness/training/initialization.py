"""From a loaded base model to an adapted one that starts as ``init=`` says."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

import lora_one
from lora_one.errors import InputError
from lora_one.harness.config.given_adapter import SETTINGS, WEIGHTS
from lora_one.harness.config.schema import Config
from lora_one.harness.distributed.ranks import rank, world_size
from lora_one.harness.models.adapter import attach_adapter, with_ranks
from lora_one.harness.plan import Plan
from lora_one.harness.resuming.checkpoint import Checkpoint
from lora_one.harness.resuming.training_state import load_model, stored_ranks
from lora_one.numerics.methods import METHODS


def initialise(config: Config, plan: Plan, base: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
    """Attach the adapter and write its first factors, computed or found in the cache.

    Returns:
        The model to train, and the init report as JSON-ready facts (what ``init.json`` holds).

    Raises:
        InputError: the adapter that is evaluated lacks a part that it says it has.
    """
    if plan.given is not None:
        path = plan.given.path
        try:
            model = PeftModel.from_pretrained(base, path, torch_device=str(base.device))
        except KeyError as error:
            raise InputError(
                f"evaluate.adapter={path}: {WEIGHTS} lacks {error}, which {SETTINGS} says was "
                "trained (modules_to_save)."
            ) from error
        return model, {"method": "adapter", "summary": f"{path}, as it is"}
    if plan.adapter is None:
        return base, {"method": "full_ft"}
    # Every rank takes its share of the rows; the library adds the shares up.
    batches = plan.init_batches[rank() :: world_size()] or None
    adapter, allocation = plan.adapter, None
    if config.init.rank_allocation == "energy":
        allocation = lora_one.allocate_ranks(
            base,
            batches,
            rank=config.peft.lora_r,
            target_modules=list(plan.shapes),
            method=config.init.method,
            seed=config.init.seed,
        )
        adapter = with_ranks(adapter, allocation.ranks)
    model = attach_adapter(base, adapter, config.init.seed, config.init.dtype)
    if config.peft.adalora:
        return model, {"method": "adalora"}
    method = config.init.method
    options: dict[str, Any] = {"norm_clip": config.init.norm_clip, "seed": config.init.seed}
    if config.init.scale is not None:
        options["scale"] = config.init.scale
    if config.init.stable_gamma is not None:
        options["stable_gamma"] = config.init.stable_gamma
    if METHODS[method].needs or METHODS[method].inputs:
        options["cache_dir"] = Path(config.output_dir) / "cache" / "init"
    report = lora_one.initialize(model, batches, method=method, **options)
    facts = report.to_dict() | {"summary": report.summary()}
    if allocation is not None:
        facts["seconds"] += allocation.seconds
        facts["rank_allocation"] = allocation.to_dict() | {"summary": allocation.summary()}
    return model, facts


def restore(config: Config, plan: Plan, base: PreTrainedModel, checkpoint: Checkpoint) -> Any:
    """Return the model as it was when a checkpoint was written; nothing is computed anew.

    Raises:
        InputError: if the checkpoint is of a model with other parameters.
    """
    model: Any = base
    if plan.adapter is not None:
        adapter = plan.adapter
        if config.init.rank_allocation == "energy":
            adapter = with_ranks(adapter, stored_ranks(checkpoint.path))
        model = attach_adapter(base, adapter, config.init.seed, config.init.dtype)
    load_model(model, checkpoint.path)
    return model
