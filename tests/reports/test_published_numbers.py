"""Published numbers: what the file may hold, and when a number may stand beside ours."""

import re
from pathlib import Path
from statistics import mean

import pytest

from lora_one.errors import InputError
from lora_one.harness.config.compose import compose_config, composer
from lora_one.reports.groups import group_runs
from lora_one.reports.paper import beside, require_table
from lora_one.reports.published import METHOD, facts_of, load, matching, mismatches, numbers, parse
from lora_one.reports.records import find_runs

LLAMA_GLUE = {
    "dataset.name": "cola",
    "dataset.train_rows": None,
    "model.name": "google-t5/t5-base",
    "model.max_steps": None,
    "model.real_batch_size": 32,
    "model.max_length": 128,
    "model.weight_decay": 0.0,
    "model.schedule": "linear",
    "model.bf16": False,
    "peft.lora_alpha": 16,
    "peft.use_rslora": True,
    "peft.lora_dropout": 0.0,
    "peft.lora_target_modules": "all",
    "peft.train_embeddings": False,
    "init.scale": "stable",
}
METRICS = {"accuracy": 0.8, "accuracy_choice": 0.82, "n": 1043}


@pytest.fixture
def group(tmp_path, write_run):
    """A run with LoRA-One's recipe for CoLA, but for what a test changes."""

    def make(**changes):
        number = len(list(tmp_path.iterdir()))
        method = changes.pop("method", "lora_one")
        write_run(
            tmp_path / str(number),
            "a",
            method=method,
            settings=LLAMA_GLUE | changes,
            record={"metrics": METRICS},
        )
        return group_runs(find_runs(tmp_path / str(number)))[0][0]

    return make


def test_table_2_is_as_published():
    found = {
        number.column: number
        for number in numbers(load(), "lora_one/table2")
        if number.row == "LoRA-One"
    }
    printed = {"MNLI": 85.89, "SST-2": 94.53, "CoLA": 82.04, "QNLI": 93.37, "MRPC": 87.83}
    assert {name: round(100 * number.value, 6) for name, number in found.items()} == printed
    assert {number.kind for number in found.values()} == {"first-hand"}


@pytest.mark.parametrize(
    ("table", "row", "column", "value", "spread"),
    [
        ("lora_one/table2", "LoRA", "CoLA", 0.7284, 0.0125),
        ("lora_one/table3", "LoRA-One", "MetaMathQA-100K: GSM8K", 0.6044, None),
        ("lora_one/figure5", "LoRA-One", "epoch 4", 0.6380, None),
        ("lora_ga/glue", "LoRA-GA", "CoLA", 0.8057, 0.0020),
        ("pissa/table2", "Llama-2-7B, PiSSA", "GSM8K", 0.5322, 0.0055),
        ("riemannian/table2", "scaled AdamW", "MRPC", 0.8946, None),
        ("peft/metamathqa", "rsLoRA, r = 64", "GSM8K", 0.5133, None),
        ("lora_one/table4", "LoRA-One", "MetaMathQA-100K GB", 21.7, None),
    ],
)
def test_values_are_in_our_units(table, row, column, value, spread):
    (number,) = (n for n in numbers(load(), table) if (n.row, n.column) == (row, column))
    assert (number.value, number.spread) == (value, spread)


# LoRA's cells in LoRA-GA's table give 82.01, where 82.08 is printed.
PRINTED_AVERAGES = {
    "lora_ga/glue": {
        "Full FT": 87.91,
        "PiSSA": 84.71,
        "rsLoRA": 79.64,
        "LoRA+": 84.95,
        "DoRA": 82.57,
        "AdaLoRA": 81.62,
        "LoRA-GA": 87.77,
    },
    "riemannian/table2": {
        "SGD": 71.21,
        "scaled GD": 80.36,
        "AdamW": 88.28,
        "AdamW, re-run": 89.00,
        "scaled AdamW": 89.01,
    },
}


@pytest.mark.parametrize("table", PRINTED_AVERAGES)
def test_the_cells_of_a_row_give_the_average_that_is_printed_beside_them(table):
    cells: dict[str, list[float]] = {}
    for number in numbers(load(), table):
        cells.setdefault(number.row, []).append(100 * number.value)
    for row, printed in PRINTED_AVERAGES[table].items():
        # Both the cells and their average are rounded to hundredths.
        assert mean(cells[row]) == pytest.approx(printed, abs=0.0101), row


def test_what_only_another_paper_prints_is_marked():
    assert {number.mark for number in numbers(load(), "lora_ga/llama2")} == {"†"}
    assert {number.mark for number in numbers(load(), "tara/llama2")} == {"‡"}


def test_recipes_name_keys_that_a_configuration_has():
    """A misspelt fact would match nothing, in silence."""
    root = Path(__file__).parents[2]
    keys = {METHOD, "optimizer.lr_ratio"}
    with composer(root / "conf"):
        for dataset in ("arithmetic", "meta_math", "alpaca", "code_feedback", "cola"):
            config = compose_config([f"dataset={dataset}"]).model_dump()
            keys |= {
                f"{a}.{b}" for a, inner in config.items() if isinstance(inner, dict) for b in inner
            }
            keys |= {key for key, value in config.items() if not isinstance(value, dict)}
    used = {key for number in numbers(load()) for key in number.settings}
    assert used <= keys


def test_a_number_stands_beside_a_run_with_its_recipe(group):
    found = matching(group(), numbers(load()))
    assert [(n.table, n.row, n.column) for n in found] == [("lora_one/table2", "LoRA-One", "CoLA")]
    assert "model.learning_rate" in found[0].unknown


@pytest.mark.parametrize(
    "change",
    [
        {"peft.lora_r": 16},
        {"model.epochs": 2.0},
        {"dataset.name": "mrpc", "method": "lora"},
        {"dataset.train_rows": 100},
        {"dataset.test_rows": 100},
        {"peft.use_rslora": False},
        {"peft.train_embeddings": True},
        {"init.rank_allocation": "energy"},
        {"init.scale": "gd"},
        {"optimizer.name": "preconditioned_adamw"},
        {"model.name": "google-t5/t5-small"},
        {"method": "gaussian"},
    ],
    ids=str,
)
def test_another_recipe_has_no_number_beside_it(group, change):
    wanted = [
        n for n in numbers(load(), "lora_one/table2") if (n.row, n.column) == ("LoRA-One", "CoLA")
    ]
    assert matching(group(**change), wanted) == []


DEPARTURES = {
    "lora_one/figure5": [{"dataset.train_rows": 1000}],
    "peft/metamathqa": [{"dataset.train_rows": 1000}, {"model.epochs": 0.1}],
    "pissa/table2": [
        {"peft.use_rslora": True},
        {"peft.lora_target_modules": "qv"},
        {"peft.lora_dropout": 0.1},
    ],
}


def test_a_departure_from_what_is_known_takes_the_published_numbers_away():
    with composer(Path(__file__).parents[2] / "conf"):
        configs = {name: compose_config([f"experiment={name}"]) for name in DEPARTURES}
    for name, config in configs.items():
        sections = [(k, v) for k, v in config.model_dump().items() if isinstance(v, dict)]
        facts = {f"{section}.{key}": value for section, v in sections for key, value in v.items()}
        facts |= {"train": config.train, METHOD: config.method}
        found = numbers(load(), name)
        assert not all(mismatches(number, facts) for number in found)
        for change in DEPARTURES[name]:
            assert all(mismatches(number, facts | change) for number in found), change


def test_what_differs_is_said(group):
    (number,) = (
        n for n in numbers(load(), "lora_one/table2") if (n.row, n.column) == ("LoRA-One", "CoLA")
    )
    assert mismatches(number, facts_of(group(**{"peft.lora_r": 16}))) == [
        "peft.lora_r is 16, published 8"
    ]


def test_one_is_one_point_zero_and_is_not_true(group):
    (number,) = (
        n for n in numbers(load(), "lora_one/table2") if (n.row, n.column) == ("LoRA-One", "CoLA")
    )
    facts = facts_of(group())
    assert mismatches(number, facts | {"model.epochs": 1.0}) == []
    assert mismatches(number, facts | {"model.epochs": True}) != []


def test_the_paper_s_table_shows_ours_below_and_says_why_not(group):
    table = beside(load(), "lora_one/table2", [group()])
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert rows["LoRA-One", "ours"] == ["–", "–", "82.00 (n = 1, lr 0.001)", "–", "–"]
    assert ("LoRA", "ours") not in rows
    assert any(
        note.startswith("PiSSA: no run has this recipe; the nearest: method is lora_one")
        for note in table.notes
    )


def test_without_runs_the_paper_s_table_stands_alone():
    table = beside(load(), "lora_one/table3", [])
    assert all(row[1] != "ours" for row in table.rows)
    assert "45.15?" in table.rows[1]


def test_an_unknown_table_is_named_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'lora_one/table2'"):
        require_table(load(), "lora_one/tabel2")


SMALL = """
sources: {s: {title: T, url: u, place: p, kind: first-hand}}
recipes: {r: {title: R, settings: {peft.lora_r: 8}}}
tables:
  t:
    title: T
    columns: {c: {title: C, metric: accuracy, unit: percent}}
    rows: [{title: row, source: s, recipe: r, values: {c: 50}}]
"""


def test_a_small_file_is_read():
    (number,) = numbers(parse(SMALL))
    assert (number.value, number.spread) == (0.5, None)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("source: s", "source: x", "no source x"),
        ("recipe: r", "recipe: x", "no recipe x"),
        ("values: {c: 50}", "values: {d: 50}", "no column d"),
        ("values: {c: 50}", "values: {c: fifty}", "tables.t.rows.0.values.c"),
        ("values: {c: 50}", "values: {c: .nan}", "tables.t.rows.0.values.c"),
        ("kind: first-hand", "kind: from memory", "sources.s.kind"),
        ("unit: percent", "unit: perhaps", "tables.t.columns.c.unit"),
        ("title: row,", "", "tables.t.rows.0.title"),
        ("title: row,", "title: row, spread: 3,", "tables.t.rows.0.spread"),
    ],
)
def test_what_does_not_belong_is_refused(old, new, words):
    assert old in SMALL
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(SMALL.replace(old, new))
