"""How many tokens a model can read, and how many it can still write after a prompt."""

from typing import Any

from transformers import PretrainedConfig

from lora_one.tasks.encoding import Architecture, TrainedArchitecture

# RoBERTa and its relatives number positions from their padding id + 1, so that as many of the
# positions in config.max_position_embeddings are no token's.
COUNT_FROM_PADDING = {
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}


def context_of(
    config: PretrainedConfig, architecture: TrainedArchitecture, tokenizer: Any
) -> int | None:
    """Return how many tokens a model can read; None where there is no limit, as for T5.

    Args:
        config: The model's configuration.
        architecture: A causal model's reply is part of what it reads; an encoder-decoder's is not,
            and has as many tokens again.
        tokenizer: The model's. It is asked for its own limit only with a classification head: an
            encoder that is told no number of positions (XLNet) has no other, while a tokenizer of
            a model that writes often names the length of its training (T5).
    """
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and context < 0:  # XLNet's way to say that there is no limit
        context = None
    if context is not None and text.model_type in COUNT_FROM_PADDING:
        context -= text.pad_token_id + 1
    if architecture == "classification":
        context = min(context or tokenizer.model_max_length, tokenizer.model_max_length)
    return context


def room_for_reply(
    context: int | None, prompt_length: int, architecture: Architecture, wanted: int
) -> int:
    """Return how many of the wanted tokens the model can write; 0 if it cannot read the prompt."""
    if context is None:
        return wanted
    if architecture == "causal":
        return max(0, min(wanted, context - prompt_length))
    return min(wanted, context) if prompt_length <= context else 0
