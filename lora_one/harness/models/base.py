"""Base models: config (before any weight is read), tokenizer, weights, and the adapter on top."""

import copy
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_one.adapters.allocation import alpha_pattern
from lora_one.errors import InputError, NotPreparedError, nearest
from lora_one.harness.config.schema import Config, ModelConfig
from lora_one.harness.models.consistency import (
    agree_on_padding,
    require_embeddings,
    require_label_order,
    require_whole,
)
from lora_one.harness.models.files import (
    fetch_model,
    model_is_here,
    require_tokenizer,
    require_weights,
)
from lora_one.numerics.methods import METHODS
from lora_one.tasks.base import Task
from lora_one.tasks.encoding import TrainedArchitecture

ROOT = Path(__file__).parents[3]
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
AUTO_CLASSES = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
}
TASK_TYPES = {
    "causal": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
    "classification": TaskType.SEQ_CLS,
}
MODEL_TYPES = {
    "CausalLM": "causal",
    "ConditionalGeneration": "seq2seq",
    "SequenceClassification": "classification",
}
# Names of heads that PEFT itself trains and saves in full.
ADDED_BY_PEFT = ("classifier", "score")
# AdaLoRA starts with a larger budget than it ends with, 1.5 times as in its paper.
ADALORA_START = 1.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """A base model that has been looked at, not loaded.

    Attributes:
        location: Local folder, or hub id.
        config: The model's own configuration; with a classification head, the head's size too.
        architecture: ``causal``, ``seq2seq`` or ``classification``.
        available_offline: Config and weights are on this machine.
    """

    location: str
    config: PretrainedConfig
    architecture: TrainedArchitecture
    available_offline: bool


def find_base(
    model: ModelConfig, *, planning: bool = False, task: type[Task] | None = None
) -> Base:
    """Find the base model and read its config.

    Args:
        model: The ``model`` section.
        task: The benchmark's class, whose labels a classification head has.
        planning: Do without the network if possible: take ``model.architecture`` for a model that
            is not on this machine (enough for a plan, not for a run).

    Raises:
        NotPreparedError: if the model is not here and the hub cannot be asked for it.
        InputError: if there is no such model, its folder holds no safetensors weights, they are
            not the ones of this model, ``model.type`` does not fit it, or a classification head
            is asked for and the benchmark is no classification.
    """
    folder = local_folder(model.name)
    location = str(folder or model.name)
    if folder is not None:
        require_weights(folder)
    elif not HUB_ID.fullmatch(model.name):
        raise InputError(f"model.name={model.name}: there is no such folder.")
    available = folder is not None or model_is_here(model)
    if not available and not planning and _is_offline():
        fetch_model(model)  # says what is missing
    if planning and not available and (model.architecture or {}).get("name") == model.name:
        facts = {key: value for key, value in model.architecture.items() if key != "name"}
        config = AutoConfig.for_model(**facts)
    else:
        try:
            config = AutoConfig.from_pretrained(
                location, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        except (OSError, ValueError) as error:
            if folder is not None:
                raise InputError(
                    f"model.name={model.name}: the folder's config.json cannot be used: "
                    f"{_first_line(error)}"
                ) from error
            raise _explain_missing_model(model.name, error) from error
    natural = "seq2seq" if config.is_encoder_decoder else "causal"
    architecture = MODEL_TYPES.get(model.type, natural)
    _require_type(config, model, architecture)
    if architecture == "classification":
        _size_head(config, task, model.name)
    base = Base(location, config, architecture, available)
    # A quantised checkpoint is packed for a device, so it is looked at when it is loaded.
    if available and not planning and not hasattr(config, "quantization_config"):
        _load(base, model, device_map="meta")
    return base


def _require_type(config: PretrainedConfig, model: ModelConfig, architecture: str) -> None:
    """Refuse ``model.type`` where transformers has no such class for this model."""

    def exists(architecture: str) -> bool:
        auto = AUTO_CLASSES[architecture]
        own_code = getattr(config, "auto_map", None) or {}
        return type(config) in auto._model_mapping or auto.__name__ in own_code

    if exists(architecture):
        return
    valid = [name for name, architecture in MODEL_TYPES.items() if exists(architecture)]
    raise InputError(
        f"model.type={model.type}: {model.name} is a {config.model_type} model, which cannot be "
        + (f"that. Valid for it: {', '.join(valid)}." if valid else "trained here. Give another.")
    )


def _size_head(config: PretrainedConfig, task: type[Task] | None, name: str) -> None:
    """Give the head one output per label, or a single one for a score."""
    if task is None or not (task.labels or task.score_range):
        benchmark = "this benchmark" if task is None else f"dataset={task.name}"
        raise InputError(
            f"model.type=SequenceClassification: {benchmark} is no classification. Choose a "
            "dataset with labels, such as sst2 or mrpc, or a model that writes text."
        )
    if task.labels:
        require_label_order(config, task, name)
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: index for index, label in enumerate(task.labels)}
    else:
        config.num_labels = 1
    config.problem_type = "single_label_classification" if task.labels else "regression"


def local_folder(name: str) -> Path | None:
    """Return a folder as given, or relative to the repository (the embedded model)."""
    candidates = (Path(name), ROOT / name)
    return next((path for path in candidates if path.is_dir()), None)


def _is_offline() -> bool:
    from huggingface_hub.constants import is_offline_mode

    return is_offline_mode()


def _explain_missing_model(name: str, error: Exception) -> NotPreparedError:
    return NotPreparedError(
        f"model.name={name}: not a local folder, and the hub did not give it "
        f"({_first_line(error)}). Or give a local folder with model.name=<path>."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def load_tokenizer(base: Base, model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that came with the base model; a classifier pads with the same id.

    Raises:
        InputError: There is none, or it makes tokens that the model has no embedding for.
    """
    if Path(base.location).is_dir():
        require_tokenizer(Path(base.location))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base.location, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.name={model.name}: its tokenizer cannot be loaded: {error}"
        ) from error
    require_embeddings(tokenizer, base.config, model.name)
    if base.architecture == "classification":
        agree_on_padding(tokenizer, base.config)
    return tokenizer


def load_base(
    base: Base, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Load the weights, safetensors only; a head that they lack starts at random."""
    return _load(base, model, dtype=dtype).to(device)


def _load(base: Base, model: ModelConfig, **options: Any) -> PreTrainedModel:
    sized = {"config": base.config} if base.architecture == "classification" else {}
    try:
        loaded, found = AUTO_CLASSES[base.architecture].from_pretrained(
            base.location,
            **sized,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            # Refused below, with the names.
            ignore_mismatched_sizes=True,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"model.name={model.name}: its weights cannot be loaded: {error}"
        ) from error
    require_whole(loaded, found, base.architecture == "classification", model.name)
    return loaded


def has_bf16() -> bool:
    """Tell whether this machine computes in bfloat16 (a CPU does, an older GPU only pretends)."""
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)


def base_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the base weights: bfloat16 if asked for, possible, and frozen.

    Under an adapter that is there already they are frozen, whatever ``peft`` says. Weights that
    are trained stay in float32, where a small update does not round away; full fine-tuning computes
    in bfloat16 by autocast instead.
    """
    frozen = config.peft.use_peft or config.evaluate.adapter is not None
    return torch.bfloat16 if config.model.bf16 and frozen and has_bf16() else torch.float32


def skeleton(base: Base) -> PreTrainedModel:
    """Build the model on the meta device: all shapes, no weights."""
    with torch.device("meta"):
        return AUTO_CLASSES[base.architecture].from_config(base.config)


def weights_fingerprint(base: Base) -> str | None:
    """Say which weights these are: hub commit, or a SHA-256 over a local folder's safetensors."""
    folder = Path(base.location)
    if not folder.is_dir():
        return getattr(base.config, "_commit_hash", None)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def adapter_config(config: Config, base: Base, total_steps: int | None = None) -> PeftConfig:
    """Translate the ``peft`` section into PEFT's own config.

    Args:
        config: The whole configuration.
        base: The base model.
        total_steps: Optimiser steps of the run; AdaLoRA plans its pruning with them.

    Raises:
        InputError: if the targets name nothing in this model.
    """
    peft = config.peft
    model = skeleton(base)
    shared = {
        "task_type": TASK_TYPES[base.architecture],
        "target_modules": _targets(peft.lora_target_modules, model),
        "lora_alpha": peft.lora_alpha,
        "lora_dropout": peft.lora_dropout,
        "modules_to_save": _trained_in_full(config, base, model) or None,
    }
    if peft.adalora:
        steps = total_steps or 1000
        # Warm up a tenth of the run at full rank, keep the last third at the final rank.
        return AdaLoraConfig(
            init_r=round(ADALORA_START * peft.lora_r),
            target_r=peft.lora_r,
            tinit=steps // 10,
            tfinal=steps // 3,
            deltaT=max(1, steps // 100),
            total_step=steps,
            **shared,
        )
    return LoraConfig(
        r=peft.lora_r,
        use_rslora=peft.use_rslora,
        use_dora=peft.dora,
        ensure_weight_tying=peft.train_embeddings and bool(model.config.tie_word_embeddings),
        **shared,
    )


def with_ranks(adapter: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """Return PEFT's config with a rank per layer, and the same scaling in all of them.

    Args:
        adapter: With the uniform rank.
        ranks: Layer name -> rank; other layers keep the uniform one.
    """
    result = copy.deepcopy(adapter)
    result.rank_pattern = {name: r for name, r in ranks.items() if r != adapter.r}
    result.alpha_pattern = alpha_pattern(
        ranks, r=adapter.r, lora_alpha=adapter.lora_alpha, use_rslora=adapter.use_rslora
    )
    return result


def _trained_in_full(config: Config, base: Base, model: PreTrainedModel) -> list[str]:
    """Name the modules that train and are exported with all their weights.

    A head is everything outside the encoder's layers: the ``classifier``, DeBERTa's ``pooler`` and
    the one inside BERT. It starts at random, in all or in many checkpoints, so an adapter without
    all of it would be one for a model that nobody has.
    """
    names = set(_embedding_names(model)) if config.peft.train_embeddings else set()
    if base.architecture == "classification":
        children = {**dict(model.named_children()), "pooler": _pooler(model)}
        children.pop(model.base_model_prefix)
        names |= {
            name
            for name, module in children.items()
            if name not in ADDED_BY_PEFT and module is not None and list(module.parameters())
        }
    return sorted(names)


def trained_in_full(base: Base, adapter: PeftConfig | None) -> set[str]:
    """Name the modules that an adapter trains with all their weights, PEFT's own choice too."""
    names = set(getattr(adapter, "modules_to_save", None) or ())
    return names | set(ADDED_BY_PEFT) if base.architecture == "classification" else names


def _pooler(model: PreTrainedModel) -> nn.Module | None:
    outside = getattr(model, "pooler", None)
    return outside if outside is not None else getattr(model.base_model, "pooler", None)


def _targets(targets: str | list[str], model: PreTrainedModel) -> str | list[str]:
    if targets == "all":
        return "all-linear"
    if targets == "qv":
        mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        if model.config.model_type not in mapping:
            raise InputError(
                f"peft=qv: PEFT does not know the query and value projections of "
                f"{model.config.model_type}. Name them: peft.lora_target_modules=[...]. "
                f"Linear layers here: {', '.join(_linear_names(model))}."
            )
        return mapping[model.config.model_type]
    if isinstance(targets, list):
        names = {part for name, _ in model.named_modules() for part in _suffixes(name)}
        for target in targets:
            if target not in names:
                linear = _linear_names(model)
                raise InputError(
                    f"peft.lora_target_modules: {target} names no module of this model."
                    f"{nearest(target, linear)} Linear layers: {', '.join(linear)}."
                )
    return targets


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _linear_names(model: nn.Module) -> list[str]:
    modules = model.named_modules()
    return sorted({name.rpartition(".")[2] for name, m in modules if isinstance(m, nn.Linear)})


def _embedding_names(model: PreTrainedModel) -> list[str]:
    embedding = model.get_input_embeddings()
    if model.config.is_encoder_decoder:
        raise InputError(
            "peft.train_embeddings=true: an encoder-decoder ties its embedding to both halves, and "
            "PEFT would train a copy that neither reads. Choose peft=all or peft=qv."
        )
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if m is embedding})


def attach_adapter(model: PreTrainedModel, adapter: PeftConfig, seed: int, dtype: str) -> PeftModel:
    """Wrap the model; the random factors of PEFT's own start come from ``seed``."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(
                # A copy: PEFT adds names to the modules that a classifier saves.
                model,
                copy.deepcopy(adapter),
                autocast_adapter_dtype=dtype == "fp32",
            )
        except ValueError as error:
            raise InputError(f"peft.lora_target_modules: {error}") from error
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            # What is trained beside the factors (embeddings, magnitudes) is kept in float32.
            target = DTYPES[dtype] if "lora_A" in name or "lora_B" in name else torch.float32
            parameter.data = parameter.data.to(target)
    for module in wrapped.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for trained in module.modules_to_save.values():
                _meet_dtypes(trained, model.dtype)
    return wrapped


def _meet_dtypes(trained: nn.Module, base: torch.dtype) -> None:
    """Let a module that is trained in float32 stand in a base of another dtype."""

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        dtype = next(module.parameters()).dtype
        return tuple(x.to(dtype) if torch.is_floating_point(x) else x for x in inputs)

    trained.register_forward_pre_hook(widen)
    if isinstance(trained, nn.Embedding):  # a head's logits stay as they are
        trained.register_forward_hook(lambda module, inputs, output: output.to(base))


def target_shapes(model: PreTrainedModel, adapter: PeftConfig) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of the linear layers that the adapter would change; on a skeleton."""
    linear = f"Linear layers: {', '.join(_linear_names(model))}."
    try:
        wrapped = get_peft_model(model, copy.deepcopy(adapter))
    except (ValueError, re.error) as error:
        reason = str(error).splitlines()[0].rstrip("( .")
        raise InputError(f"peft.lora_target_modules: {reason}. {linear}") from error
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "lora_A") and len(module.lora_A) and hasattr(module, "out_features")
    }
    if not shapes:
        raise InputError(f"peft.lora_target_modules names no linear layer. {linear}")
    return shapes


def check_rank(config: Config, shapes: dict[str, tuple[int, int]]) -> None:
    """Refuse a rank that a target layer cannot have.

    Raises:
        InputError: naming the smallest layer and the largest rank that would do.
    """
    if not config.peft.use_peft:
        return
    name, shape = min(shapes.items(), key=lambda item: min(item[1]))
    factor, why = METHODS[config.init.method].rank_multiple, ""
    if factor > 1:
        why = f" ({config.init.direction} takes {factor}r singular vectors)"
    elif config.peft.adalora:
        factor, why = ADALORA_START, " (AdaLoRA starts at rank 1.5 r)"
    if round(factor * config.peft.lora_r) > min(shape):
        raise InputError(
            f"peft.lora_r={config.peft.lora_r} is too large for {name}, which is "
            f"{shape[0]} x {shape[1]}{why}. The largest usable rank is {int(min(shape) / factor)}."
        )


def trainable_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters that the optimiser moves."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
