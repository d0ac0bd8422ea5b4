r"""GLUE (Wang et al. 2019, arXiv:1804.07461) as text-to-text.

MNLI, SST-2, CoLA, QNLI, MRPC and QQP have the prompts and label words of the LoRA-GA code
(``Outsider565/LoRA-GA``, ``reproduce/data.py``), which the published T5 rows of LoRA-GA and
LoRA-One are trained with: ``"classify the sentiment of the text: {sentence}\nresult: "``. RTE,
STS-B and WNLI, which those papers do not report, have those of T5 (Raffel et al. 2020,
arXiv:1910.10683, appendix D): ``"rte sentence1: {sentence1} sentence2: {sentence2}"``.

The labels of GLUE's test splits are hidden; ``test`` is the validation split, MNLI's the matched
rows (the published column, ``accuracy_matched``) followed by the mismatched ones.
"""

from lora_one.tasks.labelled import LabelledText, Layout, Subtask, task_class

HUB_ID = "nyu-mll/glue"

_LORA_GA = "the LoRA-GA code"
_T5 = "T5 (Raffel et al. 2020)"
_SIMILARITY = "classify the semantic similarity of the text: "

_HUB = Layout(("train",), {"validation": ("validation",)})
_GLUE = Layout(("train",), {"validation": ("dev",)})
_FILES = (_HUB, _GLUE)
_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_MATCHED = {"validation_matched": ("dev_matched",), "validation_mismatched": ("dev_mismatched",)}

PUBLISHED = (
    Subtask(
        name="mnli",
        hub_config="mnli",
        prompt=_SIMILARITY + "{premise}\n{hypothesis}\nresult: ",
        columns={"premise": ("sentence1",), "hypothesis": ("sentence2",)},
        texts=("{premise}", "{hypothesis}"),
        labels=("entailment", "neutral", "contradiction"),
        label_columns=("label", "gold_label"),
        layouts=(
            Layout(("train",), {split: (split,) for split in _MATCHED}),
            Layout(("train",), _MATCHED),
            Layout(("train_original_format*",), _MATCHED),
        ),
        primary_metric="accuracy_matched",
    ),
    Subtask(
        name="sst2",
        hub_config="sst2",
        prompt="classify the sentiment of the text: {sentence}\nresult: ",
        columns={"sentence": ()},
        texts=("{sentence}",),
        labels=("negative", "positive"),
        layouts=_FILES,
    ),
    Subtask(
        name="cola",
        hub_config="cola",
        prompt="classify the grammaticality of the text: {sentence}\nresult: ",
        columns={"sentence": ()},
        texts=("{sentence}",),
        labels=("unacceptable", "acceptable"),
        metric="matthews",
        layouts=(
            _HUB,
            Layout(("train",), {"validation": ("dev",)}, _COLA_COLUMNS),
            Layout(
                ("in_domain_train",),
                # GLUE's validation split is these two, in this order.
                {"validation": ("in_domain_dev", "out_of_domain_dev")},
                _COLA_COLUMNS,
            ),
        ),
    ),
    Subtask(
        name="qnli",
        hub_config="qnli",
        prompt=(
            "classify the semantic similarity of the question and the sentence: "
            "{question}\n{sentence}\nresult: "
        ),
        columns={"question": (), "sentence": ()},
        texts=("{question}", "{sentence}"),
        labels=("entailment", "not_entailment"),
        layouts=_FILES,
    ),
    Subtask(
        name="mrpc",
        hub_config="mrpc",
        prompt=_SIMILARITY + "{sentence1}\n{sentence2}\nresult: ",
        columns={"sentence1": ("#1 String",), "sentence2": ("#2 String",)},
        texts=("{sentence1}", "{sentence2}"),
        labels=("different", "equivalent"),
        source_labels=("not_equivalent", "equivalent"),
        label_columns=("label", "Quality"),
        metric="f1",
        # GLUE's split of Microsoft's training file needs an id list; without it, Microsoft's own
        # split into training and test is kept whole, so that no row is on both sides.
        layouts=(
            *_FILES,
            Layout(("msr_paraphrase_train",), {"validation": ("msr_paraphrase_test",)}),
        ),
    ),
    Subtask(
        name="qqp",
        hub_config="qqp",
        prompt=_SIMILARITY + "{question1}\n{question2}\nresult: ",
        columns={"question1": (), "question2": ()},
        texts=("{question1}", "{question2}"),
        labels=("different", "duplicate"),
        source_labels=("not_duplicate", "duplicate"),
        label_columns=("label", "is_duplicate"),
        metric="f1",
        layouts=_FILES,
        leave_out_malformed=True,
    ),
)

T5_STYLE = (
    Subtask(
        name="rte",
        hub_config="rte",
        prompt="rte sentence1: {sentence1} sentence2: {sentence2}",
        columns={"sentence1": (), "sentence2": ()},
        texts=("{sentence1}", "{sentence2}"),
        labels=("entailment", "not_entailment"),
        layouts=_FILES,
    ),
    Subtask(
        name="stsb",
        hub_config="stsb",
        prompt="stsb sentence1: {sentence1} sentence2: {sentence2}",
        columns={"sentence1": (), "sentence2": ()},
        texts=("{sentence1}", "{sentence2}"),
        label_columns=("label", "score"),
        metric="correlation",
        score_range=(0.0, 5.0),
        layouts=_FILES,
        primary_metric="pearson",
    ),
    Subtask(
        name="wnli",
        hub_config="wnli",
        prompt="wnli sentence1: {sentence1} sentence2: {sentence2}",
        columns={"sentence1": (), "sentence2": ()},
        texts=("{sentence1}", "{sentence2}"),
        labels=("not_entailment", "entailment"),
        layouts=_FILES,
    ),
)

GLUE: tuple[type[LabelledText], ...] = (
    *(task_class(subtask, HUB_ID, _LORA_GA) for subtask in PUBLISHED),
    *(task_class(subtask, HUB_ID, _T5) for subtask in T5_STYLE),
)
