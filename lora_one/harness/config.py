"""The configuration schema: every key, its type, its range and what it means.

``validate`` turns the dictionary that Hydra composed into a frozen ``Config``. It imports no
torch, so that a typing mistake is answered at once. Keys that the chosen method does not read are
set to None, so that two command lines that mean the same run share one run id.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_one.errors import InputError, nearest
from lora_one.harness.task_options import check_options, describe, require_task

# The groups of conf/config.yaml's defaults list.
GROUPS = ("dataset", "model", "peft", "init", "optimizer", "tracking")

# init.direction, in the spelling of the papers -> method name of lora_one.initialize.
METHODS = {
    "LoRA": "lora",
    "gaussian": "gaussian",
    "kaiming": "kaiming",
    "orthogonal": "orthogonal",
    "PiSSA": "pissa",
    "OLoRA": "olora",
    "LoRA-GA": "lora_ga",
    "LoRA-One": "lora_one",
}
GRADIENT_METHODS = {"lora_ga", "lora_one"}
SCALED_METHODS = GRADIENT_METHODS | {"gaussian", "kaiming", "orthogonal"}

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no silent conversions, no changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DatasetConfig(Section):
    """Which rows are learnt and scored; keys beyond these are options of the benchmark's class."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="benchmark")
    path: str | None = Field(description="local file or folder in the benchmark's own schema")
    train_rows: Count | None = Field(description="at most this many training rows")
    validation_rows: Count | None = Field(description="at most this many validation rows")
    test_rows: Count | None = Field(description="at most this many test rows")
    loss_on: Literal["response", "all"] = Field(description="tokens that carry loss")
    max_new_tokens: Count = Field(description="longest generated answer, in tokens")
    seed: Seed = Field(description="seed of the selection and order of rows")

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are options of this benchmark alone."""
        return dict(self.model_extra or {})

    @property
    def common(self) -> dict[str, Any]:
        """The keys that every benchmark has, but for its name."""
        return {key: getattr(self, key) for key in type(self).model_fields if key != "name"}


class ModelConfig(Section):
    """The base model and, as in the official repositories, how it is trained."""

    name: str = Field(min_length=1, description="hub id or local Hugging Face folder")
    type: Literal["auto", "CausalLM", "ConditionalGeneration", "SequenceClassification"] = Field(
        description="auto: as the model's own config says"
    )
    revision: str | None = Field(description="hub branch, tag or commit")
    architecture: dict[str, Any] | None = Field(
        description="model config for dry_run where the hub cannot be reached"
    )
    trust_remote_code: bool = Field(description="run Python code that comes with the model")
    bf16: bool = Field(description="base weights in bfloat16 (adapters stay float32)")
    epochs: Positive = Field(description="passes over the training rows")
    max_steps: Count | None = Field(description="stop after this many optimiser steps")
    learning_rate: Positive
    weight_decay: NotNegative
    max_grad_norm: Positive | None = Field(description="gradient clipping; null: none")
    schedule: Literal["linear", "cosine", "constant"] = Field(description="after the warm-up")
    warmup_steps: NotNegative = Field(description="steps, or a share of all steps when below 1")
    per_device_batch_size: Count
    real_batch_size: Count = Field(description="rows per optimiser step, over all devices")
    max_length: Count = Field(description="rows with more tokens are left out, and counted")
    gradient_checkpointing: bool
    logging_steps: Count
    eval_epochs: Positive = Field(description="validation loss every so many epochs")
    seed: Seed = Field(description="seed of dropout and of the order of the batches")


class PeftConfig(Section):
    """The adapter's shape."""

    use_peft: bool = Field(description="false: full fine-tuning")
    lora_r: Count
    lora_alpha: Count
    use_rslora: bool = Field(description="scaling alpha / sqrt(r); false: alpha / r")
    lora_dropout: float = Field(ge=0, lt=1)
    lora_target_modules: str | list[str] = Field(
        description="all, qv, a list of module names, or a regular expression"
    )
    train_embeddings: bool = Field(description="train the input embedding in full")
    dora: bool
    adalora: bool


class InitConfig(Section):
    """How the adapter starts."""

    direction: str = Field(description="the method: " + ", ".join(METHODS))
    dtype: Literal["fp32", "bf16"] = Field(description="dtype of the adapter")
    seed: Seed = Field(description="seed of random factors and of the randomised SVD")
    scale: Literal["stable", "unit", "gd", "weightS"] | None = None
    stable_gamma: Positive | Literal["auto"] | None = Field(
        None, description="the inverse of the paper's gamma; auto: chosen by the init batch's loss"
    )
    norm_clip: bool = Field(description="shrink the factors where s B0 A0 would exceed W")
    bsz: Count | None = Field(None, description="rows per micro-batch of the one-step gradient")
    iters: Count | None = Field(None, description="micro-batches of the one-step gradient")
    max_length: Count | None = Field(None, description="longest row of the one-step gradient")

    @property
    def method(self) -> str:
        """Name of the method as ``lora_one.initialize`` takes it."""
        return METHODS[self.direction]


class AdamWConfig(Section):
    """torch.optim.AdamW."""

    name: Literal["adamw", "lorafa"]
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(min_length=2, max_length=2)
    eps: Positive


class PreconditionedConfig(AdamWConfig):
    """AdamW on preconditioned gradients, ours or PEFT's."""

    name: Literal["preconditioned_adamw", "riemannian"]
    damping: NotNegative = Field(description="d in (B^T B + d I)^-1")


class LoraPlusConfig(AdamWConfig):
    """LoRA+."""

    name: Literal["loraplus"]
    lr_ratio: Positive = Field(description="learning rate of lora_B over that of lora_A")


OptimizerConfig = Annotated[
    AdamWConfig | PreconditionedConfig | LoraPlusConfig, Field(discriminator="name")
]


class EvaluationConfig(Section):
    """How answers are generated."""

    batch_size: Count = Field(description="prompts generated for at a time")


class ExportConfig(Section):
    """What adapter is left behind."""

    rank: Count | None = Field(
        description="cut the exported adapter to this rank; null: exact, rank 2r after an offset"
    )


class WandbConfig(Section):
    """Where Weights & Biases keeps the run."""

    name: str | None = Field(description="display name; null: the run id")
    project: str
    entity: str | None


class Config(Section):
    """One experiment."""

    seed: Seed
    dataset: DatasetConfig
    model: ModelConfig
    peft: PeftConfig
    init: InitConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig
    export: ExportConfig
    tracking: Literal["none", "wandb"]
    wandb: WandbConfig
    output_dir: str = Field(min_length=1)
    dry_run: bool
    verbose: bool = Field(description="print the init report layer by layer")

    @property
    def method(self) -> str:
        """What really runs: an initialiser's name, ``adalora`` or ``full_ft``."""
        if not self.peft.use_peft:
            return "full_ft"
        if self.peft.adalora:
            return "adalora"
        return f"dora_{self.init.method}" if self.peft.dora else self.init.method


def validate(composed: Mapping[str, Any]) -> Config:
    """Check the composed configuration against the schema and against itself.

    Raises:
        InputError: the first key that is unknown, of the wrong type or out of range, or the first
            pair of settings that contradict each other.
    """
    composed = {section: _copy(value) for section, value in composed.items()}
    if isinstance(composed.get("init"), dict):
        _settle_init(composed["init"])
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
    """Spell ``init.direction`` as in METHODS and clear the keys that its method does not read."""
    given = init.get("direction")
    spellings = {name.lower(): name for name in METHODS} | {m: d for d, m in METHODS.items()}
    direction = spellings.get(str(given).lower())
    if direction is None:
        choices = ", ".join(METHODS)
        raise InputError(
            f"init.direction={given}: no such method.{nearest(str(given), METHODS)}"
            f" Valid: {choices}."
        )
    init["direction"] = direction
    method = METHODS[direction]
    if method in SCALED_METHODS and init.get("scale") == "stable":
        if init.get("stable_gamma") is None:
            raise InputError(f"init.stable_gamma is needed by init.direction={direction}")
    elif init.get("stable_gamma") == "auto" or _is_positive(init.get("stable_gamma")):
        init["stable_gamma"] = None
    if init.get("stable_gamma") == "auto" and method != "lora_one":
        raise InputError(
            f"init.stable_gamma=auto compares losses after the start, and {direction} starts at "
            "the base model's loss. Give a number, or init=lora_one."
        )
    if method in SCALED_METHODS and init.get("scale") is None:
        raise InputError(f"init.scale is needed by init.direction={direction}")
    if method not in SCALED_METHODS and "scale" in init:
        init["scale"] = None
    for key in ("bsz", "iters", "max_length"):
        if method in GRADIENT_METHODS and init.get(key) is None:
            raise InputError(f"init.{key} is needed by init.direction={direction}")
        if method not in GRADIENT_METHODS and _is_positive(init.get(key)):
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


def _explain(error: ValidationError, composed: Mapping[str, Any]) -> str:
    """Say in one message what was given, what was expected and what is nearest."""
    first = error.errors()[0]
    # A branch of a union is part of pydantic's path but not of the key.
    path = [str(part) for part in first["loc"]]
    if path[0] == "optimizer" and len(path) > 2:
        path.pop(1)
    if path[0] in ("peft", "init"):
        path = path[:2]
    key = ".".join(path)
    kind = first["type"]
    if kind == "extra_forbidden":
        valid = _keys_of(path[:-1], composed)
        where = f"in {'.'.join(path[:-1])}" if path[:-1] else "at the top level"
        return (
            f"{key}: nothing reads this key.{nearest(path[-1], valid)}"
            f" Valid keys {where}: {', '.join(valid)}."
        )
    if kind == "missing":
        return f"{key} is missing: give {key}=<value>."
    if kind == "union_tag_invalid":
        given, valid = composed["optimizer"].get("name"), _optimizer_names()
        return (
            f"optimizer.name={given}: no such optimiser.{nearest(str(given), valid)}"
            f" Valid: {', '.join(valid)}."
        )
    return describe(key, first["input"], [first])


def _optimizer_names() -> list[str]:
    branches = get_args(get_args(OptimizerConfig)[0])
    return [name for b in branches for name in get_args(b.model_fields["name"].annotation)]


def _keys_of(path: list[str], composed: Mapping[str, Any]) -> list[str]:
    """Return the valid keys of the section at ``path``."""
    if not path:
        return list(Config.model_fields)
    if path == ["optimizer"]:
        name = composed["optimizer"].get("name")
        for branch in get_args(get_args(OptimizerConfig)[0]):
            if name in get_args(branch.model_fields["name"].annotation):
                return list(branch.model_fields)
    section = Config.model_fields[path[0]].annotation
    return list(section.model_fields)
