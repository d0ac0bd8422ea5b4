"""Whether a checkpoint, its configuration and its tokenizer are those of one whole model."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_one.errors import InputError, some
from lora_one.tasks.base import Task
from lora_one.tasks.encoding import padding_id


def require_embeddings(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, name: str
) -> None:
    """Refuse tokens beyond the embedding.

    Special ones that no text needs may lie there, such as one for images.

    Args:
        tokenizer: Of the model.
        config: Of the model, whose ``vocab_size`` is the embedding's rows.
        name: ``model.name``, for the message.

    Raises:
        InputError: A text can become a token that has no row.
    """
    rows = config.get_text_config().vocab_size
    used = {tokenizer.eos_token_id, padding_id(tokenizer), *tokenizer("a").input_ids}
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    unused = special - used
    vocabulary = tokenizer.get_vocab().items()
    beyond = [(id_, token) for token, id_ in vocabulary if id_ >= rows and id_ not in unused]
    if beyond:
        id_, token = min(beyond)
        raise InputError(
            f"model.name={name}: its tokenizer has tokens ({len(beyond)}) beyond the {rows} rows "
            f"of the embedding, the first {token!r} with id {id_}. Give the tokenizer that "
            "belongs to the model, or resize the embedding and save the model again."
        )


def agree_on_padding(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Let a classifier know the id that its rows are padded with.

    The head of a decoder reads the last token of a row that is another. The model's own id goes
    before the tokenizer's; where it has none that is a token, as Llama-2, GPT-2 and Qwen2.5 (and
    early Llama checkpoints, which have -1), it is told that one.
    """
    text = config.get_text_config()
    own = getattr(text, "pad_token_id", None)
    if own in tokenizer.get_vocab().values():
        tokenizer.pad_token_id = own
    else:
        text.pad_token_id = padding_id(tokenizer)


def require_label_order(config: PretrainedConfig, task: type[Task], name: str) -> None:
    """Refuse a head that has the benchmark's labels in another order, as RoBERTa's for MNLI has.

    Args:
        config: Of the model, as its folder has it.
        task: The benchmark.
        name: ``model.name``, for the message.

    Raises:
        InputError: The head's answers would be taken for other labels.
    """
    given = [str(label) for _, label in sorted(config.id2label.items())]
    names = [label.lower() for label in given]
    expected = [label.lower() for label in task.labels]
    if names != expected and sorted(names) == sorted(expected):
        raise InputError(
            f"model.name={name}: its head's classes are {', '.join(given)}; dataset={task.name} "
            f"counts them as {', '.join(task.labels)}, so that answers would be taken for others. "
            "Save the model with the rows of its head in this order, or give one without a head."
        )


def require_whole(
    loaded: PreTrainedModel, found: Mapping[str, Any], new_head: bool, name: str
) -> None:
    """Refuse a checkpoint that lacks weights, which transformers draws at random, or has others.

    Those of an adapter that lies beside them too: transformers puts it on the model unasked.

    Args:
        loaded: The model, with or without its numbers.
        found: What ``from_pretrained`` says with ``output_loading_info=True``.
        new_head: The model has a classification head, which may start at random.
        name: ``model.name``, for the message.

    Raises:
        InputError: Tensors are missing, of another shape, or an adapter's.
    """
    if getattr(loaded, "peft_config", None):
        raise InputError(
            f"model.name={name}: beside the weights lies an adapter (adapter_config.json), which "
            "transformers puts on the model. Give a folder without it; an adapter is evaluated "
            "with evaluate.adapter=<folder>."
        )
    missing = sorted(
        key for key in found["missing_keys"] if not (new_head and _in_head(key, loaded))
    )
    if missing:
        raise InputError(
            f"model.name={name}: its checkpoint lacks {len(missing)} of the tensors of "
            f"{type(loaded).__name__}: {some(missing)}. Give a whole checkpoint"
            f"{_saved_as(loaded)}."
        )
    other = sorted(found["mismatched_keys"])
    if new_head and other and all(_in_head(key, loaded) for key, *_ in other):
        raise InputError(
            f"model.name={name}: its classification head has another size than the "
            f"{loaded.config.num_labels} outputs that this dataset needs; give the pretrained "
            "encoder"
        )
    if other:
        shapes = [f"{key} is {_by(is_)}, expected {_by(should)}" for key, is_, should in other]
        raise InputError(
            f"model.name={name}: its checkpoint and its config.json differ in shape: "
            f"{some(shapes)}. Give weights and config of the same model."
        )


def _in_head(key: str, model: PreTrainedModel) -> bool:
    """Tell whether a tensor lies outside the encoder's layers: its head and pooler."""
    prefix = f"{model.base_model_prefix}."
    return not key.startswith(prefix) or key.startswith(f"{prefix}pooler.")


def _saved_as(model: PreTrainedModel) -> str:
    saved = model.config.architectures or []
    if not saved or type(model).__name__ in saved:
        return ""
    return f": this one was saved as {saved[0]}, so it may need another model.type or base"


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
