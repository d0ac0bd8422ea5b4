"""From examples to token ids and batches. Nothing is truncated: a row that does not fit is dropped.

Prompt and target are tokenised separately and joined as ids. The training row therefore begins
with exactly the ids that ``encode_prompts`` gives at generation time; tokenised together, a
tokenizer may merge characters across the border, and the model would be asked to continue from a
prefix it never saw.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lora_one.errors import InputError
from lora_one.tasks.base import CountTokens, Example
from lora_one.tasks.classification import encode_texts, head_label, require_texts
from lora_one.tasks.packed import Packed, PackedRows

Architecture = Literal["causal", "seq2seq"]
# What can be trained: a language model, or an encoder with a classification head.
TrainedArchitecture = Literal["causal", "seq2seq", "classification"]
# Texts counted at a time: a fast tokenizer keeps kilobytes of offsets for each until it is done.
_COUNTED = 2000
IGNORED = -100  # the label that torch's cross entropy and the Hugging Face Trainer skip


@dataclass(frozen=True)
class EncodedRows:
    """Token ids of the rows that fit; a map-style dataset for a ``DataLoader`` or the Trainer.

    Attributes:
        rows: Dicts of ``input_ids`` and ``labels``, lists of int; a list, or ``PackedRows`` from
            the cache. Causal: of equal length, labels aligned with the ids (the model shifts).
            Seq2seq: source ids and target ids.
            Classification: the ids of the texts (and ``token_type_ids``), and one class or score.
        row_ids: The row id of each kept row, in the same order.
        dropped_row_ids: The row ids left out because they exceed ``max_length``.
        max_length: The limit that was applied.
    """

    rows: Sequence[Packed]
    row_ids: list[str]
    dropped_row_ids: list[str]
    max_length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Packed:
        return self.rows[index]

    @property
    def dropped(self) -> int:
        """Number of rows left out because they exceed ``max_length``."""
        return len(self.dropped_row_ids)

    @property
    def lengths(self) -> list[int]:
        """Number of input tokens of each kept row."""
        if isinstance(self.rows, PackedRows):
            return self.rows.lengths("input_ids")
        return [len(row["input_ids"]) for row in self.rows]

    @property
    def tokens(self) -> int:
        """Number of input tokens in all kept rows."""
        return sum(self.lengths)

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens (classification: rows) that the loss is taken over."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"])


def encode(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    max_length: int,
    architecture: TrainedArchitecture,
    loss_on: Literal["response", "all"] = "response",
) -> EncodedRows:
    """Tokenise examples for training or for the validation loss.

    Causal: ``input_ids = [BOS] prompt target EOS`` with BOS where the tokenizer adds one, and
    ``max_length`` bounds their number. Seq2seq: ``input_ids`` is the prompt with the special
    tokens of the tokenizer, ``labels = target EOS``, and ``max_length`` bounds each of the two.
    Classification: ``input_ids`` is the text, or the pair with the tokenizer's separators,
    ``labels`` the class index, or the score of a benchmark without classes.

    Args:
        examples: The rows.
        tokenizer: A Hugging Face tokenizer with an EOS token.
        max_length: Rows with more tokens are dropped and counted.
        architecture: ``causal``, ``seq2seq`` or ``classification``.
        loss_on: ``response`` (target and EOS) or, for causal models, ``all`` tokens.

    Raises:
        InputError: No row, no row that fits, a tokenizer without EOS, rows without texts for a
            head, or ``loss_on="all"`` for a model that predicts the target only.
    """
    if architecture != "causal" and loss_on == "all":
        raise InputError(
            f"loss_on='all' has no meaning for a {architecture} model, which predicts only the "
            "target; use loss_on='response'"
        )
    if not examples:
        raise InputError("there is no row to encode")
    if architecture == "classification":
        return _encode_for_head(examples, tokenizer, max_length)
    eos = eos_token_id(tokenizer)
    prompts = encode_prompts([e.prompt for e in examples], tokenizer, architecture=architecture)
    targets = [[*ids, eos] for ids in encode_targets([e.target for e in examples], tokenizer)]
    rows, row_ids, dropped, shortest = [], [], [], None
    for example, prompt, target in zip(examples, prompts, targets, strict=True):
        length = (
            len(prompt) + len(target) if architecture == "causal" else max(len(prompt), len(target))
        )
        shortest = length if shortest is None else min(shortest, length)
        if length > max_length:
            dropped.append(example.row_id)
            continue
        row_ids.append(example.row_id)
        if architecture == "seq2seq":
            rows.append({"input_ids": prompt, "labels": target})
            continue
        # Nothing predicts the first token, so it is never supervised; masking it keeps every way
        # of counting labels (shifted or not) in agreement.
        context = [IGNORED] * len(prompt) if loss_on == "response" else [IGNORED, *prompt[1:]]
        rows.append({"input_ids": prompt + target, "labels": context + target})
    if not rows:
        raise _all_too_long(len(examples), max_length, shortest)
    return EncodedRows(rows, row_ids, dropped, max_length)


def _encode_for_head(examples: Sequence[Example], tokenizer: Any, max_length: int) -> EncodedRows:
    require_texts(examples)
    encoded = encode_texts([example.texts for example in examples], tokenizer)
    lengths = [len(row["input_ids"]) for row in encoded]
    kept = [place for place, length in enumerate(lengths) if length <= max_length]
    if not kept:
        raise _all_too_long(len(examples), max_length, min(lengths))
    return EncodedRows(
        [{**encoded[place], "labels": [head_label(examples[place])]} for place in kept],
        [examples[place].row_id for place in kept],
        [e.row_id for e, length in zip(examples, lengths, strict=True) if length > max_length],
        max_length,
    )


def _all_too_long(rows: int, max_length: int, shortest: int | None) -> InputError:
    return InputError(
        f"all {rows} rows are longer than max_length={max_length} tokens (the shortest has "
        f"{shortest}); raise model.max_length"
    )


def encode_prompts(
    prompts: Sequence[str], tokenizer: Any, *, architecture: Architecture
) -> list[list[int]]:
    """Tokenise prompts, for training and generation alike.

    The special tokens of the tokenizer are kept (Llama's BOS, T5's closing EOS), except an EOS
    that a tokenizer set to ``add_eos_token`` would put between a causal model's prompt and target.

    Raises:
        InputError: A prompt without any token: there is nothing to continue from.
    """
    encoded = _ids(tokenizer, prompts, special=True)
    if architecture == "causal" and _appends_eos(tokenizer):
        encoded = [ids[:-1] for ids in encoded]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise InputError(f"the tokenizer turns the prompt {prompt!r} into no token at all")
    return encoded


def encode_targets(targets: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenise targets as ``encode`` does, without special tokens; training appends EOS.

    A target that begins with a space continues a prompt that ends in a word ("Answer:" and " B").
    A tokenizer that writes a space before every text by itself (SentencePiece's first "▁") is
    given it without that space, which it would otherwise have twice; so the ids are those that
    follow the prompt's in the joined text, for either kind of tokenizer.
    """
    if _prepends_space(tokenizer):
        targets = [target.removeprefix(" ") for target in targets]
    return _ids(tokenizer, targets, special=False)


def token_counter(tokenizer: Any) -> CountTokens:
    """Return a function that counts the tokens of texts, special tokens included."""

    def count(texts: list[str]) -> list[int]:
        parts = (texts[start : start + _COUNTED] for start in range(0, len(texts), _COUNTED))
        return [len(ids) for part in parts for ids in _ids(tokenizer, part, special=True)]

    return count


def padding_id(tokenizer: Any) -> int:
    """Return the id that fills masked positions: the pad token or, where there is none, EOS.

    The attention mask, not the id, says what is padding, so EOS serves as well.
    """
    pad = tokenizer.pad_token_id
    return eos_token_id(tokenizer) if pad is None else pad


@dataclass(frozen=True)
class Collator:
    """Pad encoded rows to the longest of the batch, on the right.

    Attributes:
        pad_token_id: Fills ``input_ids`` (``padding_id(tokenizer)``); labels are filled with -100.
        architecture: ``causal`` pads ids and labels to one length; ``seq2seq`` each to its own;
            ``classification`` has one label a row.
        pad_to_multiple_of: Round lengths up to a multiple, for tensor cores.
        prepare_decoder_input_ids_from_labels: For seq2seq, the method of that name of the model:
            the Trainer takes the labels away before the forward pass when it computes the loss
            itself, so the batch carries the decoder's inputs.
    """

    pad_token_id: int
    architecture: TrainedArchitecture
    pad_to_multiple_of: int | None = None
    prepare_decoder_input_ids_from_labels: Callable[..., Tensor] | None = None

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask``, ``labels``, each (rows, length), int64.

        For seq2seq, ``decoder_input_ids`` too, where the function to make them was given. For
        classification, ``labels`` is (rows,), float32 for scores, and ``token_type_ids`` is there
        where the rows have them.
        """
        inputs = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": self._pad(inputs, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(ids) for ids in inputs], 0),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._pad([row["token_type_ids"] for row in rows], 0)
        if self.architecture == "classification":
            batch["labels"] = torch.tensor([row["labels"][0] for row in rows])
        else:
            batch["labels"] = self._pad([row["labels"] for row in rows], IGNORED)
        if self.architecture == "seq2seq" and self.prepare_decoder_input_ids_from_labels:
            batch["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(
                labels=batch["labels"]
            )
        return batch

    def _pad(self, sequences: Iterable[Sequence[int]], value: int) -> Tensor:
        sequences = list(sequences)
        width = max(len(sequence) for sequence in sequences)
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        return torch.tensor([[*seq, *[value] * (width - len(seq))] for seq in sequences])


def supervised_tokens(batch: Mapping[str, Tensor], architecture: TrainedArchitecture) -> int:
    """Count the tokens of a batch that the loss is taken over; for classification, the rows.

    A causal model predicts ``labels[:, 1:]``; a seq2seq model predicts every label.
    """
    labels = batch["labels"][:, 1:] if architecture == "causal" else batch["labels"]
    return int((labels != IGNORED).sum())


def eos_token_id(tokenizer: Any) -> int:
    """Return the id that ends a target.

    Raises:
        InputError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so a model could not learn where a reply ends; "
            "set tokenizer.eos_token"
        )
    return tokenizer.eos_token_id


def _ids(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    # Not verbose: the tokenizer would warn of rows longer than the model, which are dropped here.
    return tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]


def _prepends_space(tokenizer: Any) -> bool:
    ids = _ids(tokenizer, ["a"], special=False)[0]
    first = tokenizer.convert_ids_to_tokens(ids[:1])
    return bool(first) and first[0][:1] in ("▁", "Ġ")


def _appends_eos(tokenizer: Any) -> bool:
    eos = tokenizer.eos_token_id
    return eos is not None and _ids(tokenizer, ["a"], special=True)[0][-1:] == [eos]
