"""What a model with a classification head is given."""

import pytest
import torch
from encoders import bert_tokenizer, roberta_tokenizer

from lora_one.errors import InputError
from lora_one.tasks import Collator, Example, encode, supervised_tokens
from lora_one.tasks.classification import encode_texts, head_label

TEXTS = ["the film is a joy", "nothing here works at all"]


def _example(index, target="b", texts=("the film", "works"), choices=("a", "b", "c")):
    return Example(f"train/{index}", "a prompt", target, "2.5", choices, texts)


@pytest.fixture(scope="module")
def roberta():
    return roberta_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def bert():
    return bert_tokenizer(TEXTS)


def test_a_pair_has_the_tokenizers_own_separators(roberta, bert):
    (row,) = encode_texts([("the film", "works")], roberta)
    assert roberta.decode(row["input_ids"]) == "<s>the film</s></s>works</s>"
    assert set(row) == {"input_ids"}
    (row,) = encode_texts([("the film", "works")], bert)
    assert bert.convert_ids_to_tokens(row["input_ids"])[0] == "[CLS]"
    first = row["input_ids"].index(3) + 1
    assert row["token_type_ids"] == [0] * first + [1] * (len(row["input_ids"]) - first)


def test_one_text_is_read_alone(roberta):
    (row,) = encode_texts([("the film",)], roberta)
    assert roberta.decode(row["input_ids"]) == "<s>the film</s>"


def test_the_label_is_the_class_index_or_the_score():
    assert [head_label(_example(0, word)) for word in "abc"] == [0, 1, 2]
    assert head_label(_example(0, choices=())) == 2.5


def test_rows_and_batches_have_one_label_each(bert):
    examples = [
        _example(0, "a"),
        _example(1, "c", texts=("the film is a joy", "nothing here works at all")),
    ]
    rows = encode(examples, bert, max_length=64, architecture="classification")
    assert rows.supervised_tokens == 2
    batch = Collator(0, "classification")(rows.rows)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert batch["labels"].tolist() == [0, 2]
    assert batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["token_type_ids"].shape
    assert batch["attention_mask"].sum(1).tolist() == [len(r["input_ids"]) for r in rows.rows]
    assert supervised_tokens(batch, "classification") == 2


def test_scores_are_floats(roberta):
    rows = encode([_example(0, choices=())], roberta, max_length=64, architecture="classification")
    labels = Collator(1, "classification")(rows.rows)["labels"]
    assert labels.tolist() == [2.5]
    assert labels.dtype == torch.float32


def test_long_rows_are_dropped_and_named(roberta):
    examples = [_example(0), _example(1, texts=("the film " * 30, "works"))]
    rows = encode(examples, roberta, max_length=20, architecture="classification")
    assert (rows.row_ids, rows.dropped_row_ids) == (["train/0"], ["train/1"])
    with pytest.raises(InputError, match=r"all 2 rows are longer than max_length=3 .*shortest has"):
        encode(examples, roberta, max_length=3, architecture="classification")


def test_what_is_no_classification_is_refused(roberta):
    with pytest.raises(InputError, match="needs a benchmark with labels"):
        encode([_example(0, texts=())], roberta, max_length=9, architecture="classification")
    with pytest.raises(InputError, match="no meaning for a classification model"):
        encode([_example(0)], roberta, max_length=9, architecture="classification", loss_on="all")
