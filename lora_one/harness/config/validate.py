"""From the dictionary that Hydra composed to a frozen ``Config``, or to one clear message.

Keys that the chosen method does not read are set to None, so that two command lines that mean the
same run share one run id. It imports no torch, so that a typing mistake is answered at once.
"""

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from lora_one.errors import InputError, nearest
from lora_one.harness.config.schema import (
    DIRECTIONS,
    SCALED_METHODS,
    Config,
    LauncherConfig,
    OptimizerConfig,
    Section,
    needs_rows,
)
from lora_one.harness.config.task_options import check_options, describe, require_task
from lora_one.harness.distributed.parallelism import DEEPSPEED, check_parallelism
from lora_one.harness.slurm.options import check_launcher
from lora_one.numerics.methods import METHODS

# Sections whose keys depend on their ``name``.
UNIONS = {"optimizer": OptimizerConfig, "launcher": LauncherConfig}


def validate(composed: Mapping[str, Any]) -> Config:
    """Check the composed configuration against the schema and against itself.

    Raises:
        InputError: the first key that is unknown, of the wrong type or out of range, or the first
            pair of settings that contradict each other.
    """
    composed = {section: _copy(value) for section, value in composed.items()}
    if isinstance(composed.get("init"), dict):
        _settle_init(composed["init"])
    if isinstance(composed.get("evaluation"), dict) and composed["evaluation"].get(
        "temperature"
    ) in (0, 0.0):
        composed["evaluation"]["seed"] = None
    try:
        config = Config.model_validate(composed)
    except ValidationError as error:
        raise InputError(_explain(error, composed)) from error
    dataset = config.dataset
    require_task(dataset.name)
    check_options(dataset.name, dataset.options, dataset.common)
    _check_consistency(config)
    return config


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _settle_init(init: dict[str, Any]) -> None:
    """Spell ``init.direction`` as the papers do and clear the keys that its method ignores."""
    given = init.get("direction")
    spellings = {name.lower(): name for name in DIRECTIONS} | {m: d for d, m in DIRECTIONS.items()}
    direction = spellings.get(str(given).lower())
    if direction is None:
        choices = ", ".join(DIRECTIONS)
        raise InputError(
            f"init.direction={given}: no such method.{nearest(str(given), DIRECTIONS)}"
            f" Valid: {choices}."
        )
    init["direction"] = direction
    method = DIRECTIONS[direction]
    if method in SCALED_METHODS and init.get("scale") == "stable":
        if init.get("stable_gamma") is None:
            raise InputError(f"init.stable_gamma is needed by init.direction={direction}")
    elif init.get("stable_gamma") == "auto" or _is_positive(init.get("stable_gamma")):
        init["stable_gamma"] = None
    if init.get("stable_gamma") == "auto" and not METHODS[method].searches_gamma:
        raise InputError(
            f"init.stable_gamma=auto compares losses after the start, and {direction} starts at "
            "the base model's loss. Give a number, or init=lora_one."
        )
    if method in SCALED_METHODS and init.get("scale") is None:
        raise InputError(f"init.scale is needed by init.direction={direction}")
    if method not in SCALED_METHODS and "scale" in init:
        init["scale"] = None
    if method in ("lora", "eva") and init.get("norm_clip") is True:
        init["norm_clip"] = False  # B A is zero
    rows = needs_rows(method, init.get("rank_allocation"))
    reason = f"init.direction={direction}"
    if not METHODS[method].from_rows:
        reason = "init.rank_allocation=energy"
    for key in ("bsz", "iters", "max_length"):
        if rows and init.get(key) is None:
            raise InputError(f"init.{key} is needed by {reason}")
        if not rows and _is_positive(init.get(key)):
            init[key] = None


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _check_consistency(config: Config) -> None:
    peft, model = config.peft, config.model
    if model.real_batch_size % model.per_device_batch_size:
        raise InputError(
            f"model.real_batch_size={model.real_batch_size} is not a multiple of "
            f"model.per_device_batch_size={model.per_device_batch_size}: the steps cannot be "
            "made of whole micro-batches."
        )
    if not peft.use_peft and config.init.method != "lora":
        raise InputError(
            "peft=full_ft trains every weight, so there is no adapter for "
            f"init.direction={config.init.direction} to start. Add init=lora."
        )
    if not peft.use_peft and config.optimizer.name != "adamw":
        raise InputError(
            f"optimizer={config.optimizer.name} works on LoRA factors, and peft=full_ft has none. "
            "Add optimizer=adamw."
        )
    if peft.adalora and peft.dora:
        raise InputError("peft.adalora and peft.dora exclude each other: choose one.")
    if peft.adalora and config.init.method != "lora":
        raise InputError(
            "peft=adalora starts from its own SVD form and takes no initialiser, "
            f"but init.direction={config.init.direction}. Add init=lora."
        )
    if peft.adalora and config.optimizer.name not in ("adamw", "loraplus"):
        raise InputError(
            f"optimizer={config.optimizer.name} is defined for the product B A, not for AdaLoRA's "
            "P diag(E) Q. Choose optimizer=adamw or loraplus."
        )
    if peft.dora and config.optimizer.name == "lorafa":
        raise InputError(
            "optimizer=lorafa pairs every lora_A with a lora_B, and DoRA's magnitude has no "
            "partner. Choose another optimizer or peft=all."
        )
    if peft.adalora and peft.use_rslora:
        raise InputError("peft.use_rslora has no effect on AdaLoRA. Add peft.use_rslora=false.")
    if peft.lora_target_modules == []:
        raise InputError("peft.lora_target_modules=[] names no layer. Write all, or qv, or a list.")
    check_parallelism(config)
    _check_allocation(config)
    _check_evaluation(config)
    _check_diagnostics(config)
    _check_comparison(config)
    if config.launcher.name == "slurm":
        check_launcher(config.launcher, config.preemption.margin_seconds)


def _check_allocation(config: Config) -> None:
    if config.init.rank_allocation == "uniform":
        return
    asked = f"init.rank_allocation={config.init.rank_allocation}"
    if config.evaluate.adapter is not None:
        raise InputError(
            f"{asked}: evaluate.adapter is there already, with its ranks. Leave one of them out."
        )
    if not config.peft.use_peft:
        raise InputError(f"{asked}: peft=full_ft has no ranks. Leave one of them out.")
    if METHODS[config.init.method].inputs:
        raise InputError(
            f"{asked} follows the gradient or W, and init.direction={config.init.direction} looks "
            "at the layers' inputs. Leave one of them out."
        )
    if config.peft.adalora:
        raise InputError(
            f"{asked}: peft=adalora allocates ranks by itself while it trains. Leave one of them "
            "out."
        )


def _check_evaluation(config: Config) -> None:
    evaluation, peft = config.evaluation, config.peft
    if evaluation.metric != "task" and evaluation.generate_only:
        raise InputError(
            "evaluation.generate_only=true writes replies, and evaluation.metric="
            f"{evaluation.metric} makes none. Leave one of the two out."
        )
    if evaluation.metric == "validation_loss" and not config.learns:
        raise InputError(
            "evaluation.metric=validation_loss needs validation rows, which a run without training "
            "rows does not read. Give evaluation.metric=task or loss."
        )
    if evaluation.temperature == 0 and evaluation.samples > 1:
        raise InputError(
            f"evaluation.samples={evaluation.samples} greedy replies would be all the same. Give "
            "evaluation.temperature=<above 0>."
        )
    if evaluation.temperature == 0 and evaluation.top_p < 1:
        raise InputError(
            f"evaluation.top_p={evaluation.top_p} has no effect on greedy replies. Give "
            "evaluation.temperature=<above 0>."
        )
    if evaluation.temperature > 0 and evaluation.seed is None:
        raise InputError("evaluation.seed is needed by evaluation.temperature above 0.")
    if config.evaluate.adapter is not None:
        return
    if config.train == "none" and not peft.use_peft:
        raise InputError(
            "peft=full_ft has nothing to initialise, and train=none nothing to train. For the base "
            "model's own row give train=none init=lora."
        )
    if evaluation.engine == "vllm" and (peft.dora or peft.train_embeddings):
        raise InputError(
            "evaluation.engine=vllm loads plain LoRA only, not DoRA's magnitudes or trained "
            "embeddings. Give evaluation.engine=transformers."
        )


def _check_diagnostics(config: Config) -> None:
    asked, off = config.diagnostics, "Give diagnostics.layers=null"
    if asked.layers is None:
        given = [f"diagnostics.{key}={value}" for key, value in asked if value is not None]
        if given:
            raise InputError(
                f"{given[0]} has no effect without diagnostics.layers. Say which: "
                "diagnostics.layers=4 (spread over depth), all, or [q_proj,v_proj]."
            )
        return
    if asked.layers == []:
        raise InputError("diagnostics.layers=[] names no layer. Write null, 4, all or a list.")
    if not config.trains:
        what = "train=none" if config.evaluate.adapter is None else "evaluate.adapter"
        raise InputError(f"diagnostics follow a training, and {what} has none. {off}.")
    if not config.peft.use_peft or config.peft.adalora:
        what = "peft=adalora has P diag(E) Q" if config.peft.adalora else "peft=full_ft has none"
        raise InputError(f"diagnostics compare the factors B and A, and {what}. {off}.")
    if config.parallelism in DEEPSPEED:
        raise InputError(
            f"parallelism={config.parallelism}: DeepSpeed keeps the factors in pieces while it "
            f"trains, and diagnostics need them whole. Give parallelism=ddp or fsdp2. {off}."
        )
    if asked.rank is not None and asked.rank > config.peft.lora_r:
        raise InputError(
            f"diagnostics.rank={asked.rank}: the factors have peft.lora_r={config.peft.lora_r} "
            "directions. Give at most that, or null for all of them."
        )


def _check_comparison(config: Config) -> None:
    comparison = config.comparison
    if comparison is None:
        return
    for key, values in comparison.grid.model_dump().items():
        if values != sorted(set(values)):
            raise InputError(
                f"comparison.grid.{key}={values}: expected ascending values, each of them once."
            )
    rates = len(comparison.grid.learning_rate)
    if comparison.trials < rates:
        raise InputError(
            f"comparison.trials={comparison.trials} is less than the {rates} learning rates of "
            "comparison.grid.learning_rate, each of which is tried. Give more trials or fewer "
            "rates."
        )
    if comparison.tuning_seed in comparison.seeds:
        raise InputError(
            f"comparison.seeds={comparison.seeds} holds comparison.tuning_seed="
            f"{comparison.tuning_seed}, with which the settings were chosen: its luck would count "
            "twice. Give other seeds."
        )
    if not config.trains:
        raise InputError(
            "comparison tunes a training, and this run has none. Leave out train=none."
        )
    if config.evaluation.metric == "validation_loss":
        raise InputError(
            "evaluation.metric=validation_loss is what the settings are chosen by; comparison ends "
            "with test rows. Give evaluation.metric=task or loss."
        )


def _explain(error: ValidationError, composed: Mapping[str, Any]) -> str:
    """Say in one message what was given, what was expected and what is nearest."""
    first = error.errors()[0]
    # A branch of a union is part of pydantic's path but not of the key.
    path = [str(part) for part in first["loc"]]
    if path[0] in UNIONS and len(path) > 2:
        path.pop(1)
    if path[0] in ("peft", "init", "evaluation", "diagnostics", "launcher"):
        path = path[:2]
    key = ".".join(path)
    kind = first["type"]
    if kind == "extra_forbidden":
        if path[0] == "launcher" and composed["launcher"].get("name") == "local":
            return (
                f"{key}: launcher=local starts no job, so nothing reads this key. Add "
                "launcher=slurm_1gpu, slurm_node or slurm_multinode."
            )
        valid = _keys_of(path[:-1], composed)
        where = f"in {'.'.join(path[:-1])}" if path[:-1] else "at the top level"
        return (
            f"{key}: nothing reads this key.{nearest(path[-1], valid)}"
            f" Valid keys {where}: {', '.join(valid)}."
        )
    if kind == "missing":
        return f"{key} is missing: give {key}=<value>."
    if kind == "union_tag_invalid":
        given, valid = composed[path[0]].get("name"), _names(path[0])
        thing = {"optimizer": "optimiser"}.get(path[0], path[0])
        return (
            f"{path[0]}.name={given}: no such {thing}.{nearest(str(given), valid)}"
            f" Valid: {', '.join(valid)}."
        )
    return describe(key, first["input"], [first])


def _branches(section: str) -> tuple[type[Section], ...]:
    return get_args(get_args(UNIONS[section])[0])


def _names(section: str) -> list[str]:
    fields = [branch.model_fields["name"] for branch in _branches(section)]
    return [name for field in fields for name in get_args(field.annotation)]


def _keys_of(path: list[str], composed: Mapping[str, Any]) -> list[str]:
    """Return the valid keys of the section at ``path``."""
    if not path:
        return list(Config.model_fields)
    if len(path) == 1 and path[0] in UNIONS:
        name = composed[path[0]].get("name")
        for branch in _branches(path[0]):
            if name in get_args(branch.model_fields["name"].annotation):
                return list(branch.model_fields)
    section: Any = Config
    for name in path:
        section = _without_none(section.model_fields[name].annotation)
    return list(section.model_fields)


def _without_none(annotation: Any) -> Any:
    """``Section | None`` -> ``Section``."""
    return next((arg for arg in get_args(annotation) if arg is not type(None)), annotation)
