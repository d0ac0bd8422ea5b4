"""Base models: config (before any weight is read), tokenizer and weights."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lora_one.errors import InputError, NotPreparedError
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
from lora_one.tasks.base import Task
from lora_one.tasks.encoding import TrainedArchitecture

ROOT = Path(__file__).parents[3]
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
AUTO_CLASSES = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
}
MODEL_TYPES = {
    "CausalLM": "causal",
    "ConditionalGeneration": "seq2seq",
    "SequenceClassification": "classification",
}


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


def require_one_direction(base: Base, name: str) -> None:
    """Refuse to let an encoder write: each token would see those that it is to predict.

    Raises:
        InputError: a language model whose attention goes both ways, such as BERT.
    """
    config = base.config
    encoder = type(config) in AutoModelForMaskedLM._model_mapping
    decodes = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    if base.architecture == "causal" and encoder and not decodes:
        raise InputError(
            f"model.name={name} is an encoder ({config.model_type}): each token sees those that it "
            "would have to predict. Add model.type=SequenceClassification, with a dataset that has "
            "labels, or give a model that writes text."
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
