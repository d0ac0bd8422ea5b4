"""Cross entropy per supervised token, as training takes it and as validation reports it."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from lora_one.errors import InputError
from lora_one.evaluation.mode import evaluation_mode, input_device
from lora_one.tasks.encoding import IGNORED, TrainedArchitecture, supervised_tokens


class TokenLoss(NamedTuple):
    """Mean loss in nats per supervised token (classification: row), and their number."""

    mean: float
    tokens: int


def token_loss_sum(logits: Tensor, labels: Tensor, architecture: TrainedArchitecture) -> Tensor:
    r"""Sum of ``-log p(label)`` over the supervised tokens, in fp32.

    With a classification head, the sum over the rows; with a single output, a score's, the sum of
    squared errors, as in transformers' own regression loss.

    Divide by the number of supervised tokens of all accumulated micro-batches (the Trainer's
    ``num_items_in_batch``) to get a loss in which every token weighs the same, however the tokens
    fall into micro-batches.

    Args:
        logits: (rows, length, vocabulary); for ``classification`` (rows, classes).
        labels: (rows, length), -100 where not supervised. For ``causal`` they are aligned with the
            input ids and shifted here: position i predicts label i + 1. For ``classification``
            (rows,), -100 for a row that carries no loss.
        architecture: ``causal``, ``seq2seq`` or ``classification``.

    Returns:
        A scalar; zero, with a gradient of zero, when nothing is supervised.
    """
    if architecture == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(logits.device)
    supervised = labels != IGNORED
    if architecture == "classification" and logits.shape[-1] == 1:
        scores = logits.squeeze(-1)[supervised]
        return mse_loss(scores.float(), labels[supervised].float(), reduction="sum")
    # Selecting first keeps the fp32 copy to the response tokens: logits are the largest tensor of
    # a training step of a small-batch language model.
    return cross_entropy(logits[supervised].float(), labels[supervised], reduction="sum")


def mean_token_loss(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], architecture: TrainedArchitecture
) -> TokenLoss:
    """Mean loss per supervised token over a whole split, the same for every batch size.

    Args:
        model: A causal or seq2seq language model or a classifier, or a ``PeftModel`` of one; left
            in the mode and with the gradients it came with.
        batches: What ``lora_one.tasks.Collator`` returns; for seq2seq with ``decoder_input_ids``.
        architecture: ``causal``, ``seq2seq`` or ``classification``.

    Raises:
        InputError: No supervised token in any batch, or a seq2seq batch without decoder inputs.
    """
    device = input_device(model)
    total, tokens = 0.0, 0
    # Without use_cache=False a language model would store keys and values nobody reads.
    options = {} if architecture == "classification" else {"use_cache": False}
    with evaluation_mode(model):
        for batch in batches:
            inputs = {key: value.to(device) for key, value in batch.items()}
            labels = inputs.pop("labels")
            if architecture == "seq2seq" and "decoder_input_ids" not in inputs:
                raise InputError(
                    "a seq2seq batch needs decoder_input_ids: give the Collator the model's "
                    "prepare_decoder_input_ids_from_labels"
                )
            logits = model(**inputs, **options).logits
            total += float(token_loss_sum(logits, labels, architecture))
            tokens += supervised_tokens({"labels": labels}, architecture)
    if tokens == 0:
        raise InputError("no token is supervised in these batches, so there is no mean loss")
    return TokenLoss(total / tokens, tokens)
