"""SuperGLUE's BoolQ, CB, COPA, RTE and WiC (Wang et al. 2019, arXiv:1905.00537) as text-to-text.

Prompts and label words are those of T5 (Raffel et al. 2020, arXiv:1910.10683, appendix D, and the
released T5 code): the task's name, then every column with its name, in alphabetical order. As in
T5, WiC's character positions are not used.

The ``dataset=`` names carry the family, ``super_glue_boolq``, since GLUE has an RTE of its own
with other columns, and Commonsense-170K a BoolQ without passages.
"""

from lora_one.tasks.labelled import LabelledText, Layout, Subtask, task_class

HUB_ID = "aps/super_glue"

_LAYOUTS = (
    Layout(("train",), {"validation": ("validation",)}),
    Layout(("train",), {"validation": ("val",)}),
)

SUBTASKS = (
    Subtask(
        name="super_glue_boolq",
        hub_config="boolq",
        prompt="boolq passage: {passage} question: {question}",
        columns={"passage": (), "question": ()},
        texts=("{question}", "{passage}"),
        labels=("False", "True"),
        layouts=_LAYOUTS,
    ),
    Subtask(
        name="super_glue_cb",
        hub_config="cb",
        prompt="cb hypothesis: {hypothesis} premise: {premise}",
        columns={"premise": (), "hypothesis": ()},
        texts=("{premise}", "{hypothesis}"),
        labels=("entailment", "contradiction", "neutral"),
        metric="macro_f1",
        layouts=_LAYOUTS,
    ),
    Subtask(
        name="super_glue_copa",
        hub_config="copa",
        prompt=(
            "copa choice1: {choice1} choice2: {choice2} premise: {premise} question: {question}"
        ),
        columns={"premise": (), "choice1": (), "choice2": (), "question": ()},
        # One head over both alternatives, not the multiple-choice head of published encoder rows.
        texts=("{premise} {question}", "{choice1} {choice2}"),
        labels=("choice1", "choice2"),
        layouts=_LAYOUTS,
    ),
    Subtask(
        name="super_glue_rte",
        hub_config="rte",
        prompt="rte hypothesis: {hypothesis} premise: {premise}",
        columns={"premise": (), "hypothesis": ()},
        texts=("{premise}", "{hypothesis}"),
        labels=("entailment", "not_entailment"),
        layouts=_LAYOUTS,
    ),
    Subtask(
        name="super_glue_wic",
        hub_config="wic",
        prompt="wic sentence1: {sentence1} sentence2: {sentence2} word: {word}",
        columns={"word": (), "sentence1": (), "sentence2": ()},
        texts=("{word}: {sentence1}", "{sentence2}"),
        labels=("False", "True"),
        layouts=_LAYOUTS,
    ),
)

SUPER_GLUE: tuple[type[LabelledText], ...] = tuple(
    task_class(subtask, HUB_ID, "T5 (Raffel et al. 2020)") for subtask in SUBTASKS
)
