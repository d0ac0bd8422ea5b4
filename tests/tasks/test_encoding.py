from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lora_one.errors import InputError
from lora_one.tasks import Collator, Example, encode, supervised_tokens, token_counter
from lora_one.tasks.encoding import encode_prompts, encode_targets, padding_id

ROWS = [
    Example("train/0-a", "Q: 1?\nA: ", "40 is it", "40"),
    Example("train/1-b", "Q: longer one?\nA:", " 4", "4"),
    Example("train/2-c", "Q:\nA: ", "x", None),
]


def _encode(tokenizer, architecture="causal", **options):
    options = {"max_length": 64, **options}
    return encode(ROWS, tokenizer, architecture=architecture, **options)


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_training_row_begins_with_exactly_the_ids_that_generation_is_given(
    make_tokenizer, template
):
    tokenizer = make_tokenizer(template)
    prompts = encode_prompts([e.prompt for e in ROWS], tokenizer, architecture="causal")
    encoded = _encode(tokenizer)
    for row, prompt in zip(encoded.rows, prompts, strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt)
        assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]


def test_tokenising_the_text_in_one_piece_would_break_that(make_tokenizer):
    tokenizer = make_tokenizer()
    joint = tokenizer(ROWS[0].prompt + ROWS[0].target)["input_ids"]
    (prompt, *_) = encode_prompts([ROWS[0].prompt], tokenizer, architecture="causal")
    assert joint[: len(prompt)] != prompt


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_causal_row_has_one_closing_eos_and_a_bos_only_where_the_tokenizer_adds_one(
    make_tokenizer, template
):
    tokenizer = make_tokenizer(template)
    for row, example in zip(_encode(tokenizer).rows, ROWS, strict=True):
        assert row["input_ids"].count(tokenizer.eos_token_id) == 1
        assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
        assert (row["input_ids"][0] == tokenizer.bos_token_id) == template.startswith("<s>")
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert text == example.prompt + example.target


def test_a_seq2seq_row_keeps_the_eos_of_the_prompt_and_closes_the_target(make_tokenizer):
    tokenizer = make_tokenizer("$A </s>")
    for row, example in zip(_encode(tokenizer, "seq2seq").rows, ROWS, strict=True):
        for ids, text in ((row["input_ids"], example.prompt), (row["labels"], example.target)):
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.eos_token_id) == 1
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_row_of_exactly_max_length_stays_and_one_more_token_drops_it(make_tokenizer):
    tokenizer = make_tokenizer("<s> $A")
    lengths = [len(row["input_ids"]) for row in _encode(tokenizer).rows]
    longest = max(lengths)
    assert _encode(tokenizer, max_length=longest).dropped == 0
    tight = _encode(tokenizer, max_length=longest - 1)
    assert tight.dropped == lengths.count(longest)
    assert tight.dropped_row_ids == [ROWS[lengths.index(longest)].row_id]
    assert [len(row["input_ids"]) for row in tight.rows] == [n for n in lengths if n < longest]
    assert len(tight.row_ids) == len(tight)


def test_for_seq2seq_the_limit_holds_for_prompt_and_target_each(make_tokenizer):
    tokenizer = make_tokenizer("$A </s>")
    example = Example("train/0-a", "ab", "abcdef", None)
    options = {"architecture": "seq2seq", "max_length": 7}
    assert len(encode([example], tokenizer, **options)) == 1
    with pytest.raises(InputError, match="the shortest has 7"):
        encode([example], tokenizer, **{**options, "max_length": 6})


def test_all_rows_too_long_states_the_shortest_and_the_limit(make_tokenizer):
    with pytest.raises(InputError, match=r"all 3 rows .*max_length=4 .*shortest has 8\)"):
        _encode(make_tokenizer(), max_length=4)


def test_unusable_requests_are_errors(make_tokenizer):
    with pytest.raises(InputError, match="no EOS token"):
        _encode(make_tokenizer(eos=False))
    with pytest.raises(InputError, match="loss_on='all' has no meaning for a seq2seq"):
        _encode(make_tokenizer(), "seq2seq", loss_on="all")
    with pytest.raises(InputError, match="no row to encode"):
        encode([], make_tokenizer(), max_length=8, architecture="causal")
    with pytest.raises(InputError, match="no token at all"):
        encode_prompts([""], make_tokenizer(), architecture="causal")


@pytest.mark.parametrize(
    ("architecture", "loss_on"),
    [("causal", "response"), ("causal", "all"), ("seq2seq", "response")],
)
def test_every_way_of_counting_supervised_tokens_agrees(make_tokenizer, architecture, loss_on):
    tokenizer = make_tokenizer("<s> $A")
    encoded = _encode(tokenizer, architecture, loss_on=loss_on)
    batch = Collator(tokenizer.pad_token_id, architecture)(encoded.rows)
    targets = [len(tokenizer(e.target, add_special_tokens=False)["input_ids"]) + 1 for e in ROWS]
    expected = sum(targets) if loss_on == "response" else encoded.tokens - len(ROWS)
    assert supervised_tokens(batch, architecture) == expected
    assert encoded.supervised_tokens == int((batch["labels"] != -100).sum()) == expected


def test_padding_is_on_the_right_masked_and_unsupervised(make_tokenizer):
    tokenizer = make_tokenizer("<s> $A")
    encoded = _encode(tokenizer)
    batch = Collator(tokenizer.pad_token_id, "causal", pad_to_multiple_of=16)(encoded.rows)
    assert {tuple(tensor.shape) for tensor in batch.values()} == {(3, 32)}
    for index, row in enumerate(encoded.rows):
        n = len(row["input_ids"])
        assert batch["input_ids"][index].tolist() == row["input_ids"] + [0] * (32 - n)
        assert batch["attention_mask"][index].tolist() == [1] * n + [0] * (32 - n)
        assert batch["labels"][index].tolist() == row["labels"] + [-100] * (32 - n)


def test_without_a_pad_token_eos_pads_and_the_real_eos_stays_visible(make_tokenizer):
    tokenizer = make_tokenizer(pad=False)
    encoded = _encode(tokenizer)
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    batch = Collator(padding_id(tokenizer), "causal")(encoded.rows)
    seen = batch["input_ids"] == tokenizer.eos_token_id
    assert (seen & batch["attention_mask"].bool()).sum(dim=1).tolist() == [1, 1, 1]
    assert (batch["labels"] == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1, 1]


def test_seq2seq_labels_have_their_own_width_and_decoder_inputs_come_from_the_model(make_tokenizer):
    tokenizer = make_tokenizer("$A </s>")
    encoded = _encode(tokenizer, "seq2seq")

    def shift(labels):
        start = torch.zeros_like(labels[:, :1])
        return torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)

    batch = Collator(0, "seq2seq", prepare_decoder_input_ids_from_labels=shift)(encoded.rows)
    assert batch["labels"].shape == (3, max(len(row["labels"]) for row in encoded.rows))
    assert batch["input_ids"].shape == (3, max(len(row["input_ids"]) for row in encoded.rows))
    assert torch.equal(batch["decoder_input_ids"], shift(batch["labels"]))


def test_the_token_counter_counts_special_tokens(make_tokenizer):
    assert token_counter(make_tokenizer("<s> $A"))(["abc", ""]) == [4, 1]


EMBEDDED = Path(__file__).resolve().parents[2] / "data" / "tiny_llama"
SENTENCE_PIECE = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260K" / "hf"


@pytest.mark.parametrize(
    "folder",
    [
        EMBEDDED,
        pytest.param(
            SENTENCE_PIECE,
            marks=pytest.mark.skipif(
                not SENTENCE_PIECE.is_dir(), reason="needs ../shared/data/stories260K/hf"
            ),
        ),
    ],
    ids=["byte-level BPE", "SentencePiece"],
)
@pytest.mark.parametrize("target", [" A", " B", " C", " D", " once upon", " 42"])
def test_a_target_that_opens_with_a_space_continues_a_word_as_in_the_joined_text(folder, target):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (prompt,) = encode_prompts(["Answer:"], tokenizer, architecture="causal")
    (continuation,) = encode_targets([target], tokenizer)
    assert prompt + continuation == tokenizer("Answer:" + target)["input_ids"]
