"""The official repositories' command lines, understood as they stand.

One translation in front of Hydra. It changes the spelling of overrides, never a value, and says
each change in one line:

==============================  ===============================================================
official                        here
==============================  ===============================================================
``+group=x``, ``++group=x``     ``group=x`` (our defaults list already has every group)
``++dataset_name=x``            ``dataset=x`` and, unless a model or an ``experiment`` is given, the
                                ``model=`` of that benchmark
``++init.direction=LoRA-One``   ``init=lora_one``: the method decides scale, gamma and offset too
``++init.weight=...``           dropped: the official code never reads it
``peft.use_loraplus=True``      ``optimizer=loraplus``
``model.prec_reg=d``            ``optimizer.damping=d``
``++model.saving=...``          dropped: every run exports its adapter
``++init.mode=...``             dropped: the method decides it
``wandb.name=x``                also ``tracking=wandb``, without which the name has no effect
==============================  ===============================================================

Besides, ``evaluate.adapter=x`` without any ``model`` key gets the base that the adapter names.

``commonsense_reasoning`` as a dataset's name is ``commonsense`` here.

``init.weight`` is dropped only beside ``dataset_name`` or a ``+group=``: elsewhere it is an
unknown key like any other.
"""

from collections.abc import Sequence

from lora_one.errors import InputError
from lora_one.harness.config.given_adapter import read_adapter
from lora_one.harness.config.schema import DIRECTIONS, GROUPS

# The model that the official READMEs train on each benchmark; T5-base is their default.
PUBLISHED_MODELS = dict.fromkeys(
    ("meta_math", "gsm8k", "alpaca", "wizard_lm", "commonsense_reasoning"), "llama"
)
DEFAULT_PUBLISHED_MODEL = "t5base"

# Official names of benchmarks that are called otherwise here.
DATASETS = {"commonsense_reasoning": "commonsense"}

WITHOUT_EFFECT = {
    "model.saving": "every run exports its adapter",
    "init.mode": "the method decides it",
}

# init.direction, in any spelling -> conf/init/<preset>.yaml
PRESETS = {direction.lower(): method for direction, method in DIRECTIONS.items()}
PRESETS |= {method: method for method in DIRECTIONS.values()}


def translate(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Translate official spellings.

    Args:
        overrides: Hydra overrides of one point (no flags, no sweeps).

    Returns:
        The overrides to give to Hydra, and one line for each thing that was changed or dropped.

    Raises:
        InputError: ``evaluate.adapter`` without a model, and its folder does not name one.
    """
    published = any(_is_official(override) for override in overrides)
    kept: list[str] = []
    notes: list[str] = []
    direction = None
    for override in overrides:
        key, value = _split(override)
        if key in GROUPS and override.startswith("+"):
            kept.append(f"{key}={value}")
        elif key == "dataset_name":
            kept.append(f"dataset={DATASETS.get(value, value)}")
            notes.append(f"{override} is read as {kept[-1]}")
        elif key == "init.direction" and value.lower() in PRESETS:
            direction = (override, PRESETS[value.lower()])
        elif key == "init.weight" and published:
            notes.append(f"{override} has no effect: the official code reads init.scale instead")
        elif key in WITHOUT_EFFECT:
            notes.append(f"{override} has no effect: {WITHOUT_EFFECT[key]}")
        elif key == "model.prec_reg":
            kept.append(f"optimizer.damping={value}")
            notes.append(f"{override} is read as {kept[-1]}")
        elif key == "peft.use_loraplus" and value.lower() in ("true", "false"):
            if value.lower() == "true":
                kept.append("optimizer=loraplus")
                notes.append(f"{override} is read as optimizer=loraplus")
        else:
            kept.append(override)

    keys = {_split(override)[0]: _split(override)[1] for override in kept}
    if direction is not None:
        override, preset = direction
        if "init" in keys and keys["init"] != preset:
            notes.append(f"init={keys['init']} gives way to {override}, which decides the method")
        kept = [o for o in kept if _split(o)[0] != "init"]
        kept.append(f"init={preset}")
        notes.append(f"{override} is read as init={preset}")
    named = [_split(o)[1] for o in overrides if _split(o)[0] == "dataset_name"]
    choosers = {"model", "model.name", "evaluate.adapter", "experiment"}
    if named and not choosers & set(keys):
        model = PUBLISHED_MODELS.get(named[-1], DEFAULT_PUBLISHED_MODEL)
        kept.append(f"model={model}")
        notes.append(f"dataset_name={named[-1]} without a model means model={model}, as published")
    adapter = keys.get("evaluate.adapter", "null")
    if adapter != "null" and not any(key.partition(".")[0] == "model" for key in keys):
        given = read_adapter(adapter)
        base = given.base
        if base is None:
            raise InputError(
                f"evaluate.adapter={adapter} does not say which base model it is for: add "
                "model.name=<its base>."
            )
        quoted = base.replace("'", "\\'")
        kept.append(f"model.name='{quoted}'")
        notes.append(f"evaluate.adapter without a model means its own base, model.name={base}")
        if given.task_type == "SEQ_CLS":
            kept.append("model.type=SequenceClassification")
            notes.append("the adapter has a head, so model.type=SequenceClassification")
    if keys.get("wandb.name", "null") != "null" and "tracking" not in keys:
        kept.append("tracking=wandb")
        notes.append("wandb.name is given, so tracking=wandb")
    return kept, notes


def _is_official(override: str) -> bool:
    key, _ = _split(override)
    return key == "dataset_name" or (override.startswith("+") and key in GROUPS)


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+"), value.strip("\"'")
