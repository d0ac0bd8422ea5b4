"""GLUE and SuperGLUE: pinned prompts, rows in every native schema, real rows, verdicts, metrics."""

import json
import math

import pytest
from fake_hub import Repository
from huggingface_hub import constants

from lora_one.errors import InputError, NotPreparedError
from lora_one.tasks import create_task, labelled
from lora_one.tasks.glue import GLUE
from lora_one.tasks.labelled import score_target
from lora_one.tasks.rows import Row, Rows
from lora_one.tasks.super_glue import SUPER_GLUE

NAMES = [task.name for task in (*GLUE, *SUPER_GLUE)]
SIMILAR = "classify the semantic similarity of the text: "

# A row as the hub gives it, the prompt and target it must become, and what an encoder reads.
HUB_ROWS = {
    "mnli": (
        {"premise": "He ran.", "hypothesis": "He moved.", "label": 0},
        f"{SIMILAR}He ran.\nHe moved.\nresult: ",
        "entailment",
        ("He ran.", "He moved."),
    ),
    "sst2": (
        {"sentence": "a joy ", "label": 1},
        "classify the sentiment of the text: a joy \nresult: ",
        "positive",
        ("a joy ",),
    ),
    "cola": (
        {"sentence": "Him sleep.", "label": 0},
        "classify the grammaticality of the text: Him sleep.\nresult: ",
        "unacceptable",
        ("Him sleep.",),
    ),
    "qnli": (
        {"question": "Who?", "sentence": "Nobody.", "label": 1},
        "classify the semantic similarity of the question and the sentence: "
        "Who?\nNobody.\nresult: ",
        "not_entailment",
        ("Who?", "Nobody."),
    ),
    "mrpc": (
        {"sentence1": "A {b}.", "sentence2": "B.", "label": 0},
        f"{SIMILAR}A {{b}}.\nB.\nresult: ",
        "different",
        ("A {b}.", "B."),
    ),
    "qqp": (
        {"question1": "A?", "question2": "", "label": 1},
        f"{SIMILAR}A?\n\nresult: ",
        "duplicate",
        ("A?", ""),
    ),
    "rte": (
        {"sentence1": "A.", "sentence2": "B.", "label": 1},
        "rte sentence1: A. sentence2: B.",
        "not_entailment",
        ("A.", "B."),
    ),
    "stsb": (
        {"sentence1": "A.", "sentence2": "B.", "label": 3.799999952316284},
        "stsb sentence1: A. sentence2: B.",
        "3.8",
        ("A.", "B."),
    ),
    "wnli": (
        {"sentence1": "A.", "sentence2": "B.", "label": 0},
        "wnli sentence1: A. sentence2: B.",
        "not_entailment",
        ("A.", "B."),
    ),
    "super_glue_boolq": (
        {"question": "is it", "passage": "It is.", "label": 1},
        "boolq passage: It is. question: is it",
        "True",
        ("is it", "It is."),
    ),
    "super_glue_cb": (
        {"premise": "P", "hypothesis": "H", "label": 1},
        "cb hypothesis: H premise: P",
        "contradiction",
        ("P", "H"),
    ),
    "super_glue_copa": (
        {"premise": "P", "choice1": "X", "choice2": "Y", "question": "cause", "label": 1},
        "copa choice1: X choice2: Y premise: P question: cause",
        "choice2",
        ("P cause", "X Y"),
    ),
    "super_glue_rte": (
        {"premise": "P", "hypothesis": "H", "label": 0},
        "rte hypothesis: H premise: P",
        "entailment",
        ("P", "H"),
    ),
    "super_glue_wic": (
        {"word": "w", "sentence1": "a w", "sentence2": "w b", "start1": 2, "label": 0},
        "wic sentence1: a w sentence2: w b word: w",
        "False",
        ("w: a w", "w b"),
    ),
}


@pytest.fixture
def hub(monkeypatch):
    """Stand for the hub: every split of every dataset has the given rows."""
    asked = []

    def serve(rows):
        def read_hub(*args):
            asked.append(args)
            found = [Row(f"hub row {index}", row) for index, row in enumerate(rows)]
            return Rows(found, {"hub": args[0], "rows": len(rows)})

        monkeypatch.setattr(labelled, "read_hub", read_hub)
        return asked

    return serve


def test_every_benchmark_has_a_pinned_prompt():
    assert sorted(HUB_ROWS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_hub_row_becomes_the_pinned_prompt_and_target(hub, name):
    row, prompt, target, texts = HUB_ROWS[name]
    asked = hub([{**row, "idx": 0}])
    task = create_task(name, revision="abc")
    example = task.load("test")[0]
    assert (example.prompt, example.target, example.texts) == (prompt, target, texts)
    assert example.choices == task.labels
    assert bool(task.labels) != bool(task.score_range)
    hub_id = "aps/super_glue" if name.startswith("super_glue") else "nyu-mll/glue"
    splits = ["validation_matched", "validation_mismatched"] if name == "mnli" else ["validation"]
    config = name.removeprefix("super_glue_")
    assert asked == [(hub_id, config, split, "abc") for split in splits]
    assert example.row_id.startswith(f"{splits[0]}/0-")


def _tsv(folder, name, *lines, bom=False, end="\n"):
    text = ("\ufeff" if bom else "") + end.join("\t".join(line) for line in lines) + end
    (folder / name).write_bytes(text.encode())


# GLUE's own files: name, header (None: there is none), a row, and the expected texts and target.
NATIVE = {
    "sst2": ("dev.tsv", ("sentence", "label"), ("a joy ", "1"), ("a joy ",), "positive"),
    "cola": ("dev.tsv", None, ("gj04", "0", "*", "Him sleep."), ("Him sleep.",), "unacceptable"),
    "qnli": (
        "dev.tsv",
        ("index", "question", "sentence", "label"),
        ("0", 'Who said "no?', 'He said "no".', "not_entailment"),
        ('Who said "no?', 'He said "no".'),
        "not_entailment",
    ),
    "mrpc": (
        "dev.tsv",
        ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
        ("1", "1089874", "1089925", '"A said.', "A said."),
        ('"A said.', "A said."),
        "equivalent",
    ),
    "qqp": (
        "dev.tsv",
        ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
        ("7", "1", "2", "A?", "B?", "0"),
        ("A?", "B?"),
        "different",
    ),
    "rte": (
        "dev.tsv",
        ("index", "sentence1", "sentence2", "label"),
        ("0", "A.", "B.", "entailment"),
        ("A.", "B."),
        "entailment",
    ),
    "wnli": (
        "dev.tsv",
        ("index", "sentence1", "sentence2", "label"),
        ("0", "A.", "B.", "1"),
        ("A.", "B."),
        "entailment",
    ),
    "stsb": (
        "dev.tsv",
        (
            [
                "index",
                "genre",
                "filename",
                "year",
                "old_index",
                "source1",
                "source2",
                "sentence1",
                "sentence2",
                "score",
            ]
        ),
        ("0", "news", "f", "2012", "1", "s", "s", "A.", "B.", "4.750"),
        ("A.", "B."),
        "4.8",
    ),
}


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(("bom", "end"), [(False, "\n"), (True, "\r\n")])
def test_glues_own_tsv_is_read(tmp_path, name, bom, end):
    file, header, row, texts, target = NATIVE[name]
    _tsv(tmp_path, file, *filter(None, [header, row]), bom=bom, end=end)
    task = create_task(name, path=tmp_path)
    (example,) = task.load("test")
    assert (example.texts, example.target) == (texts, target)
    assert task.sources["test"]["validation"]["file"] == str(tmp_path / file)


@pytest.mark.parametrize("labels", [2, 5])
def test_mnlis_tsv_of_12_and_16_columns_is_read_by_name(tmp_path, labels):
    header = [
        "index",
        "promptID",
        "pairID",
        "genre",
        "sentence1_binary_parse",
        "sentence2_binary_parse",
        "sentence1_parse",
        "sentence2_parse",
        "sentence1",
        "sentence2",
    ] + [f"label{n}" for n in range(1, labels)]
    header.append("gold_label")
    for split, gold in (("matched", "neutral"), ("mismatched", "contradiction")):
        row = [*("x" * 8), "He ran.", "He moved.", *["entailment"] * (labels - 1), gold]
        _tsv(tmp_path, f"dev_{split}.tsv", header, row)
    examples = create_task("mnli", path=tmp_path).load("test")
    assert [example.target for example in examples] == ["neutral", "contradiction"]
    assert [e.row_id.split("/")[0] for e in examples] == [
        "validation_matched",
        "validation_mismatched",
    ]


SUPER_GLUE_LINES = {
    "super_glue_boolq": ({"question": "q", "passage": "p", "idx": 0, "label": True}, "True"),
    "super_glue_cb": ({"premise": "p", "hypothesis": "h", "label": "neutral"}, "neutral"),
    "super_glue_copa": (
        {"premise": "p", "choice1": "a", "choice2": "b", "question": "effect", "label": 0},
        "choice1",
    ),
    "super_glue_rte": ({"premise": "p", "hypothesis": "h", "label": "entailment"}, "entailment"),
    "super_glue_wic": (
        {"word": "w", "sentence1": "a", "sentence2": "b", "start1": 0, "label": False},
        "False",
    ),
}


@pytest.mark.parametrize("name", SUPER_GLUE_LINES)
def test_superglues_own_jsonl_is_read(tmp_path, name):
    row, target = SUPER_GLUE_LINES[name]
    (tmp_path / "val.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = create_task(name, path=tmp_path).load("test")
    assert example.target == target


def test_the_hubs_parquet_shards_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for shard in (0, 1):
        rows = [{"sentence": f"s{shard}{n}", "label": n % 2, "idx": n} for n in range(3)]
        file = tmp_path / f"train-0000{shard}-of-00002.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    task = create_task("sst2", path=tmp_path, held_out_rows=2)
    assert len(task.load("train")) + len(task.load("validation")) == 6
    assert [source["rows"] for source in task.sources["train"]["files"]] == [3, 3]


def test_train_and_validation_share_no_first_text_and_make_up_the_file(tmp_path):
    rows = [("sentence1", "sentence2", "label")]
    rows += [(f"text {n % 20}", f"other {n}", str(n % 2)) for n in range(60)]
    _tsv(tmp_path, "train.tsv", *rows)
    task = create_task("rte", path=tmp_path)
    train, validation = task.load("train"), task.load("validation")
    assert len(train) + len(validation) == 60
    assert len({example.texts[0] for example in validation}) == 2  # a tenth of 20
    assert not {e.texts[0] for e in train} & {e.texts[0] for e in validation}
    other = create_task("rte", path=tmp_path, split_seed=1).load("validation")
    assert {e.row_id for e in other} != {e.row_id for e in validation}
    assert task.counts["train"]["in the other of train and validation"] == len(validation)


def test_broken_lines_of_quoras_pairs_are_counted_and_others_refused(tmp_path):
    header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    good = ("7", "1", "2", "A?", "B?", "0")
    _tsv(tmp_path, "dev.tsv", header, good, ("8", "broken"), good)
    task = create_task("qqp", path=tmp_path)
    assert len(task.load("test")) == 2
    assert task.counts["test"]["lines with another number of columns"] == 1
    _tsv(tmp_path, "dev.tsv", ("sentence", "label"), ("a", "0"), ("broken",))
    with pytest.raises(InputError, match=r"dev\.tsv, line 3: 1 columns; expected 2"):
        create_task("sst2", path=tmp_path).load("test")


@pytest.mark.parametrize(
    ("name", "lines", "said"),
    [
        ("sst2", [("sentence", "label"), ("a", "2")], r"line 2: label '2'; expected negative"),
        ("sst2", [("sentence", "label"), ("a", "-1")], "labels of the test split are hidden"),
        ("sst2", [("sentence", "label"), ("a", "good")], "label 'good'; expected negative, pos"),
        ("sst2", [("index", "sentence"), ("0", "a")], "needs a label in 'label'"),
        ("sst2", [("text", "label"), ("a", "1")], r"needs a text in 'sentence' \(columns here: te"),
        ("rte", [("sentence1", "label"), ("a", "1")], "rte needs a text in 'sentence2'"),
        ("stsb", [("sentence1", "sentence2", "score"), ("a", "b", "5.1")], "score '5.1'; expected"),
        ("stsb", [("sentence1", "sentence2", "score"), ("a", "b", "x")], "a number from 0 to 5"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, lines, said):
    _tsv(tmp_path, "dev.tsv", *lines)
    with pytest.raises(InputError, match=said):
        create_task(name, path=tmp_path).load("test")


def test_a_missing_file_lists_what_is_there(tmp_path):
    _tsv(tmp_path, "dev.tsv", ("sentence", "label"), ("a", "1"))
    task = create_task("sst2", path=tmp_path)
    with pytest.raises(InputError, match=r"no train \(.*\) for the train split .* holds: dev\.tsv"):
        task.load("train")
    with pytest.raises(InputError, match=r"dev\.tsv is a file; expected a folder"):
        create_task("sst2", path=tmp_path / "dev.tsv").load("test")
    with pytest.raises(InputError, match="no dev_matched"):
        _tsv(tmp_path, "train_original_format.tsv", ("sentence1", "sentence2", "gold_label"))
        create_task("mnli", path=tmp_path).load("test")
    with pytest.raises(InputError, match="unknown split 'dev'"):
        task.load("dev")


def test_glues_training_rows_are_never_tested_on_microsofts_split(tmp_path):
    """GLUE's MRPC validation rows are part of Microsoft's training file: never both at once."""
    header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    _tsv(tmp_path, "msr_paraphrase_train.txt", header, ("1", "1", "2", "A", "B"))
    _tsv(tmp_path, "dev.tsv", header, ("1", "1", "2", "A", "B"))
    task = create_task("mrpc", path=tmp_path)
    assert len(task.load("test")) == 1
    with pytest.raises(InputError, match="no train "):
        task.load("train")


@pytest.mark.parametrize(
    ("reply", "parsed", "correct"),
    [
        ("equivalent", "equivalent", True),
        (" equivalent\n", "equivalent", True),
        ("different", "different", False),
        ("not_equivalent", None, False),
        ("Equivalent", None, False),
        ("equivalent equivalent", None, False),
        ("", None, False),
    ],
)
def test_a_reply_is_a_label_word_or_unread(hub, reply, parsed, correct):
    hub([HUB_ROWS["mrpc"][0] | {"label": 1}])
    task = create_task("mrpc")
    (example,) = task.load("test")
    assert task.score(reply, example) == {"exact": {"parsed": parsed, "correct": correct}}


@pytest.mark.parametrize(
    ("reply", "parsed", "correct"),
    [
        ("3.8", "3.8", True),
        (" 3.80", "3.80", True),
        ("3.7512", "3.7512", True),  # a head's number rounds to 3.8
        ("4", "4", False),
        ("5.0", "5.0", False),
        ("5.1", None, False),
        ("-1", None, False),
        ("3.", None, False),
        ("nan", None, False),
        ("3.8 of 5", None, False),
        ("", None, False),
    ],
)
def test_a_score_is_a_number_on_the_scale_or_unread(hub, reply, parsed, correct):
    hub([HUB_ROWS["stsb"][0]])
    task = create_task("stsb")
    (example,) = task.load("test")
    assert example.reference == "3.800"
    assert task.score(reply, example) == {"exact": {"parsed": parsed, "correct": correct}}


@pytest.mark.parametrize(
    ("score", "target"),
    [(0, "0.0"), (5, "5.0"), (2.25, "2.2"), (2.31, "2.4"), (4.75, "4.8"), (0.1, "0.0")],
)
def test_scores_are_rounded_to_fifths_as_in_t5(score, target):
    assert score_target(score) == target


def _rows(task, gold, exact, choice=None, split="validation"):
    def verdict(said, true):
        return {"parsed": said, "correct": said == true}

    return [
        {
            "row_id": f"{split}/{index}-0",
            "reference": true,
            "scores": {"exact": verdict(said, true), "choice": verdict(best, true)},
        }
        for index, (true, said, best) in enumerate(zip(gold, exact, choice or exact, strict=True))
    ]


def test_matthews_and_f1_are_those_of_the_confusion_table():
    """3 true positives, 1 false positive, 2 false negatives, 2 true negatives."""
    gold = [1, 1, 1, 0, 1, 1, 0, 0]
    said = [1, 1, 1, 1, 0, 0, 0, 0]
    for name, metric, expected in (
        ("cola", "matthews", (3 * 2 - 1 * 2) / math.sqrt(4 * 5 * 3 * 4)),
        ("mrpc", "f1", 2 * 3 / (2 * 3 + 1 + 2)),
        ("qqp", "f1", 2 * 3 / (2 * 3 + 1 + 2)),
    ):
        task = create_task(name)
        words = [task.labels[n] for n in gold], [task.labels[n] for n in said]
        metrics = task.summarise(_rows(task, *words, choice=words[0]))
        assert metrics[metric] == metrics[f"{metric}_exact"] == pytest.approx(expected)
        assert metrics[f"{metric}_choice"] == pytest.approx(1.0)
        assert metrics["accuracy"] == metrics["accuracy_exact"] == 5 / 8
        assert metrics["accuracy_choice"] == 1.0


def test_an_unread_reply_counts_as_the_other_class():
    task = create_task("cola")
    gold = ["acceptable", "unacceptable", "acceptable", "unacceptable"]
    unread = [None, "unacceptable", "acceptable", None]
    flipped = ["unacceptable", "unacceptable", "acceptable", "acceptable"]
    one, other = (task.summarise(_rows(task, gold, said)) for said in (unread, flipped))
    assert one["matthews"] == other["matthews"] == 0.0
    assert (one["unparsed"], other["unparsed"]) == (0.5, 0.0)


def test_constant_predictions_are_said_and_never_nan():
    cola, stsb = create_task("cola"), create_task("stsb")
    gold = ["acceptable", "unacceptable", "acceptable"]
    metrics = cola.summarise(_rows(cola, gold, ["acceptable"] * 3, gold))
    assert (metrics["matthews"], metrics["constant"]) == (0.0, 1.0)
    assert (metrics["matthews_choice"], metrics["constant_choice"]) == (1.0, 0.0)
    metrics = stsb.summarise(_rows(stsb, ["1.000", "2.000"], ["3.0", "3.0"]))
    assert (metrics["pearson"], metrics["spearman"], metrics["constant"]) == (0.0, 0.0, 1.0)
    json.dumps(metrics, allow_nan=False)
    json.dumps(stsb.summarise(_rows(stsb, ["1.000"], ["3.0"])), allow_nan=False)


def test_correlations_are_those_of_the_definition():
    task = create_task("stsb")
    gold, said = [0.0, 1.0, 2.0, 5.0], [1.0, 0.0, 2.0, 4.0]
    metrics = task.summarise(_rows(task, map(str, gold), map(str, said), map(str, said)))
    # Sums of (x - 2)(y - 1.75), (x - 2)^2 and (y - 1.75)^2; ranks differ in one swap.
    assert metrics["pearson"] == pytest.approx(10 / math.sqrt(14 * 8.75))
    assert metrics["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    unread = task.summarise(_rows(task, map(str, gold), [None, "0", "2", "4"], gold))
    worst = task.summarise(_rows(task, map(str, gold), ["5", "0", "2", "4"], gold))
    assert unread["pearson"] == worst["pearson"]


def test_cbs_f1_is_the_mean_over_its_three_classes():
    task = create_task("super_glue_cb")
    gold = ["entailment", "entailment", "contradiction", "neutral"]
    said = ["entailment", None, "contradiction", "contradiction"]
    metrics = task.summarise(_rows(task, gold, said))
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_mnli_is_reported_matched_and_mismatched():
    task = create_task("mnli")
    matched = _rows(task, ["neutral", "entailment"], ["neutral"] * 2, split="validation_matched")
    other = _rows(task, ["neutral"], ["contradiction"], split="validation_mismatched")
    metrics = task.summarise(matched + other)
    assert (metrics["accuracy_matched"], metrics["accuracy_mismatched"]) == (0.5, 0.0)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert task.primary_metric == "accuracy_matched"


REAL = {
    "sst2": ("glue_sst2", 67_349, 436),
    "cola": ("glue_cola", 8_551, 521),
    "mrpc": ("glue_mrpc", 4_076, 862),
    "mnli": ("glue_mnli", 150, 6_815),
}


@pytest.mark.parametrize("name", REAL)
def test_real_rows_are_all_read(real_data, name):
    folder, train_rows, test_rows = REAL[name]
    task = create_task(name, path=real_data(folder))
    train, validation, test = (task.load(split) for split in ("train", "validation", "test"))
    assert len(train) + len(validation) == train_rows
    assert len(test) == test_rows
    ids = [example.row_id for example in (*train, *validation, *test)]
    assert len(set(ids)) == len(ids)
    assert {example.target for example in train} == set(task.labels)
    assert all(example.target == example.reference for example in test)


def test_real_mnli_rows_have_three_labels_in_glues_order(real_data):
    task = create_task("mnli", path=real_data("glue_mnli"))
    assert task.labels == ("entailment", "neutral", "contradiction")
    test = task.load("test")
    assert test[0].target == "neutral"
    assert test[1].target == "contradiction"
    assert {example.row_id.split("/")[0] for example in test} == {"validation_matched"}


def test_real_qnli_rows_with_unpaired_quotes_are_one_a_line(real_data):
    test = create_task("qnli", path=real_data("glue_qnli")).load("test")
    assert len(test) == 3_463
    odd = [example for example in test if "".join(example.texts).count('"') % 2]
    assert odd
    assert all("\t" not in "".join(example.texts) for example in test)


def test_real_mrpc_rows_with_bom_and_quotes_are_whole(real_data):
    train = create_task("mrpc", path=real_data("glue_mrpc")).load("train")
    first = next(example for example in train if example.row_id.startswith("train/0-"))
    assert first.texts[0] == (
        'Amrozi accused his brother, whom he called "the witness", of deliberately distorting '
        "his evidence."
    )
    assert not any(text.endswith("\r") for example in train for text in example.texts)


def test_the_hubs_own_layout_is_read_offline(tmp_path, monkeypatch):
    """Parquet shards of MNLI as nyu-mll/glue has them; one file missing, and it says so."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def shard(*labels):
        buffer = pyarrow.BufferOutputStream()
        rows = [{"premise": f"p{n}", "hypothesis": "h", "label": n, "idx": 0} for n in labels]
        parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return buffer.getvalue().to_pybytes()

    splits = {"train": (0, 1, 2), "validation_matched": (2, 1), "validation_mismatched": (0,)}
    paths = [f"  - split: {split}\n    path: mnli/{split}-*" for split in splits]
    readme = "---\nconfigs:\n- config_name: mnli\n  data_files:\n" + "\n".join(paths) + "\n---\n"
    files = {f"mnli/{split}-00000-of-00001.parquet": shard(*n) for split, n in splits.items()}
    repository = Repository("dataset", "nyu-mll/glue", {"README.md": readme.encode(), **files})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    present = [name for name in repository.files if "mismatched" not in name]
    repository.fill_cache(tmp_path / "hub", present)
    task = create_task("mnli", revision=repository.commit)
    assert not task.origin().available_offline
    with pytest.raises(NotPreparedError):
        task.load("test")
    repository.fill_cache(tmp_path / "all")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "all"))
    assert task.origin().available_offline
    test = task.load("test")
    assert [example.target for example in test] == ["contradiction", "neutral", "entailment"]
    assert [e.row_id.split("/")[0].rpartition("_")[2] for e in test] == [
        "matched",
        "matched",
        "mismatched",
    ]
    assert len(task.load("train")) == 2
