"""Everything that can be known, and can be wrong, before a weight is loaded or a file written."""

from copy import deepcopy
from dataclasses import dataclass

from peft import PeftConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from lora_one.adapters.stored import UNCHECKED_BY_PEFT
from lora_one.errors import InputError
from lora_one.evaluation.evaluate import plan_jobs
from lora_one.harness.config.given_adapter import SETTINGS, WEIGHTS, GivenAdapter, read_adapter
from lora_one.harness.config.schema import Config
from lora_one.harness.console import quiet_libraries
from lora_one.harness.data.rows import Batch, Data, init_batches, load_data
from lora_one.harness.distributed.parallelism import require_launcher, require_whole_weights
from lora_one.harness.evaluation import check_engine
from lora_one.harness.models.adapter import (
    TASK_TYPES,
    adapter_config,
    check_rank,
    target_shapes,
)
from lora_one.harness.models.base import (
    Base,
    find_base,
    load_tokenizer,
    require_one_direction,
    skeleton,
)
from lora_one.harness.training.diagnostics import choose_layers, reference_batches
from lora_one.harness.training.loop import Schedule, plan_steps
from lora_one.numerics.methods import METHODS
from lora_one.tasks.encoding import Collator, padding_id
from lora_one.tasks.registry import TASKS

ALWAYS_PACKED = ("bitsandbytes", "gptq", "awq")


@dataclass(frozen=True)
class Plan:
    """A run that has been thought through.

    Attributes:
        base: The base model, not loaded.
        tokenizer: Its tokenizer.
        data: Encoded rows and the benchmark.
        collator: Makes batches of them.
        schedule: Optimiser steps; None without training.
        adapter: PEFT's config of the adapter; None for full fine-tuning.
        shapes: (out, in) of the layers that the adapter changes.
        init_batches: Batches of the one-step gradient, or of the init loss alone; may be none.
        given: The adapter that is there already, if one is evaluated.
        diagnosed: Layers that are looked at while they train.
        reference: Batches of the gradient that they are compared with.
    """

    base: Base
    tokenizer: PreTrainedTokenizerBase
    data: Data
    collator: Collator
    schedule: Schedule | None
    adapter: PeftConfig | None
    shapes: dict[str, tuple[int, int]]
    init_batches: list[Batch]
    given: GivenAdapter | None
    diagnosed: list[str]
    reference: list[Batch]


def make_plan(config: Config) -> Plan:
    """Look at the model's config, the tokenizer and the data.

    Raises:
        InputError: whatever is wrong with them.
    """
    quiet_libraries()
    if not config.dry_run:  # the plan of a cluster's run may be looked at on one core
        require_launcher(config)
    base = find_base(config.model, task=TASKS[config.dataset.name])
    given = given_adapter(config)
    adapter, shapes = plan_adapter(config, base)
    require_whole_weights(config, adapter)
    diagnosed = choose_layers(config.diagnostics.layers, list(shapes))
    tokenizer = load_tokenizer(base, config.model)
    data = load_data(config, tokenizer, base)
    plan_jobs(data.test, config.evaluation.samples)
    check_engine(config, base, data, given)
    schedule = plan_steps(config.model, len(data.train)) if config.trains else None
    if config.peft.adalora and schedule is not None:
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
    return Plan(
        base,
        tokenizer,
        data,
        collator,
        schedule,
        adapter,
        shapes,
        batches,
        given,
        diagnosed,
        reference_batches(config, data, collator, batches),
    )


def given_adapter(config: Config) -> GivenAdapter | None:
    """Look at the folder of ``evaluate.adapter``, if there is one."""
    path = config.evaluate.adapter
    return None if path is None else read_adapter(path)


def plan_adapter(
    config: Config, base: Base
) -> tuple[PeftConfig | None, dict[str, tuple[int, int]]]:
    """Resolve the target layers on a skeleton and check the rank against them."""
    given = given_adapter(config)
    if given is not None:
        return match_adapter(given, base, config.model.name)
    require_one_direction(base, config.model.name)
    _require_unpacked(config, base)
    if not config.peft.use_peft:
        return None, {}
    adapter = adapter_config(config, base)
    shapes = target_shapes(skeleton(base), adapter)
    check_rank(config, shapes)
    return adapter, shapes


def _require_unpacked(config: Config, base: Base) -> None:
    """Refuse to change weights that are packed; some formats may be unpacked as they are loaded."""
    packing = getattr(base.config, "quantization_config", None) or {}
    if config.peft.use_peft:
        changes = f"init.direction={config.init.direction}"
        leaves = not METHODS[config.init.method].offset
    else:
        changes, leaves = "peft=full_ft", False
    if packing.get("quant_method") in ALWAYS_PACKED and not leaves:
        raise InputError(
            f"model.name={config.model.name} is quantised ({packing['quant_method']}), and "
            f"{changes} would have to change its weights. Choose init=lora or init=lora_one with "
            "an adapter, or the unquantised model."
        )


def match_adapter(
    given: GivenAdapter, base: Base, name: str
) -> tuple[PeftConfig, dict[str, tuple[int, int]]]:
    """Check an adapter that is there already against a skeleton of the base.

    Returns:
        PEFT's config of it, and the shapes (out, in) of the layers that it changes.

    Raises:
        InputError: it is no LoRA, damaged, or was made for a model with other layers.
    """
    if given.kind != "LORA":
        raise InputError(f"evaluate.adapter={given.path}: a {given.kind} adapter; expected LORA.")
    if given.task_type not in (None, TASK_TYPES[base.architecture].value):
        types = {"CAUSAL_LM": "CausalLM", "SEQ_2_SEQ_LM": "ConditionalGeneration"}
        needed = {**types, "SEQ_CLS": "SequenceClassification"}.get(given.task_type)
        raise InputError(
            f"evaluate.adapter={given.path} is for {given.task_type}, and model.name={name} is "
            f"loaded as {TASK_TYPES[base.architecture].value}."
            + (f" Add model.type={needed}." if needed else "")
        )
    try:
        adapter = PeftConfig.from_pretrained(given.path)
        # On a skeleton there is no weight to start from, and the start is overwritten anyway.
        adapter.init_lora_weights = False
        shapes = target_shapes(skeleton(base), adapter)
        model = get_peft_model(skeleton(base), deepcopy(adapter))
    except UNCHECKED_BY_PEFT as error:
        raise InputError(
            f"evaluate.adapter={given.path}: PEFT cannot make an adapter of its {SETTINGS} "
            f"({type(error).__name__}: {error})."
        ) from error
    expected = {
        key.replace(".default", ""): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if ".lora_A." in key or ".lora_B." in key
    }
    try:
        with safe_open(given.path / WEIGHTS, "pt") as file:
            found = {
                key: tuple(file.get_slice(key).get_shape())
                for key in file.keys()  # noqa: SIM118 -- safe_open is no mapping
                if ".lora_A." in key or ".lora_B." in key
            }
    except SafetensorError as error:
        raise InputError(
            f"evaluate.adapter={given.path}: {WEIGHTS} is damaged: {error}. Get it again; a file "
            "of a few hundred bytes may be Git LFS's note of where it is."
        ) from None
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            raise InputError(
                f"evaluate.adapter={given.path} does not fit model.name={name}: {key} is "
                f"{found.get(key, 'missing')} in the adapter and {expected.get(key, 'missing')} in "
                f"the model. The adapter names {given.base} as its base."
            )
    return adapter, shapes
