"""Everything that can be known, and can be wrong, before a weight is loaded or a file written."""

from dataclasses import dataclass

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from lora_one.harness.config import Config
from lora_one.harness.console import quiet_libraries
from lora_one.harness.data import Batch, Data, init_batches, load_data
from lora_one.harness.models import (
    Base,
    adapter_config,
    check_rank,
    find_base,
    load_tokenizer,
    skeleton,
    target_shapes,
)
from lora_one.harness.training import Schedule, plan_steps
from lora_one.tasks.encoding import Collator, padding_id
from lora_one.tasks.registry import TASKS


@dataclass(frozen=True)
class Plan:
    """A run that has been thought through.

    Attributes:
        base: The base model, not loaded.
        tokenizer: Its tokenizer.
        data: Encoded rows and the benchmark.
        collator: Makes batches of them.
        schedule: Optimiser steps.
        adapter: PEFT's config of the adapter; None for full fine-tuning.
        shapes: (out, in) of the layers that the adapter changes.
        init_batches: Batches of the one-step gradient, or of the init loss alone.
    """

    base: Base
    tokenizer: PreTrainedTokenizerBase
    data: Data
    collator: Collator
    schedule: Schedule
    adapter: PeftConfig | None
    shapes: dict[str, tuple[int, int]]
    init_batches: list[Batch]


def make_plan(config: Config) -> Plan:
    """Look at the model's config, the tokenizer and the data.

    Raises:
        InputError: whatever is wrong with them.
    """
    quiet_libraries()
    base = find_base(config.model, task=TASKS[config.dataset.name])
    adapter, shapes = plan_adapter(config, base)
    tokenizer = load_tokenizer(base, config.model)
    data = load_data(config, tokenizer, base.architecture)
    schedule = plan_steps(config.model, len(data.train))
    if config.peft.adalora:
        adapter = adapter_config(config, base, schedule.total_steps)
    collator = Collator(
        padding_id(tokenizer),
        base.architecture,
        prepare_decoder_input_ids_from_labels=(
            skeleton(base).prepare_decoder_input_ids_from_labels
            if base.architecture == "seq2seq"
            else None
        ),
    )
    batches = init_batches(config, data, collator) if config.peft.use_peft else []
    return Plan(base, tokenizer, data, collator, schedule, adapter, shapes, batches)


def plan_adapter(
    config: Config, base: Base
) -> tuple[PeftConfig | None, dict[str, tuple[int, int]]]:
    """Resolve the target layers on a skeleton and check the rank against them."""
    if not config.peft.use_peft:
        return None, {}
    adapter = adapter_config(config, base)
    shapes = target_shapes(skeleton(base), adapter)
    check_rank(config, shapes)
    return adapter, shapes
