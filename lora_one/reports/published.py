"""Published numbers, and which of them may stand beside a row of ours.

``published.yaml`` holds recipes (facts of the configuration that a number depends on), sources and
tables. A number is shown beside a row only if every fact of its recipe that is known holds for the
row; facts that the source does not give are named with it. Numbers that only another paper prints
are marked as second-hand.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_one.reports.groups import Group

SourceClass = Literal["first-hand", "second-hand", "re-run"]
Unit = Literal["percent", "fraction", "GB", "seconds", "score"]
PERCENT_DIGITS = 2
MARKS: Mapping[SourceClass, str] = {"first-hand": "", "second-hand": "†", "re-run": "‡"}
MARK_WORDS = "† second-hand: quoted by another paper; ‡ re-run by somebody else"
# Facts about our own run that no recipe states as settings; see ``facts_of``.
METHOD = "method"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Source(_Entry):
    """Where numbers come from."""

    title: str
    url: str
    place: str = Field(description="where in it")
    kind: SourceClass


class Recipe(_Entry):
    """What a run must be for a number to be comparable with it."""

    title: str
    settings: dict[str, Any] = Field(description="section.key of the configuration -> value")
    unknown: tuple[str, ...] = Field((), description="settings that the source does not give")
    out_of_reach: tuple[str, ...] = Field((), description="facts that no configuration here has")
    notes: tuple[str, ...] = ()


Cell = Annotated[tuple[float, float | None] | None, Field(description="value and spread")]


class Column(_Entry):
    """One column of a table."""

    title: str
    metric: str
    unit: Unit
    settings: dict[str, Any] = Field(default_factory=dict)


class PublishedRow(_Entry):
    """One row of a table."""

    title: str
    source: str
    recipe: str
    settings: dict[str, Any] = Field(default_factory=dict)
    n: int | None = Field(None, gt=0)
    values: dict[str, Cell]
    doubts: dict[str, str] = Field(default_factory=dict)


class PublishedTable(_Entry):
    """A table as it was published, by key such as ``lora_one/table2``."""

    title: str
    columns: dict[str, Column]
    rows: tuple[PublishedRow, ...]

    @model_validator(mode="after")
    def _columns_exist(self) -> "PublishedTable":
        for row in self.rows:
            unknown = (row.values.keys() | row.doubts.keys()) - self.columns.keys()
            if unknown:
                raise ValueError(f"row {row.title}: no column {', '.join(sorted(unknown))}")
        return self


class Published(_Entry):
    """The whole file."""

    sources: dict[str, Source]
    recipes: dict[str, Recipe]
    tables: dict[str, PublishedTable]

    @model_validator(mode="after")
    def _names_exist(self) -> "Published":
        for key, table in self.tables.items():
            for row in table.rows:
                if row.source not in self.sources:
                    raise ValueError(f"{key}, row {row.title}: no source {row.source}")
                if row.recipe not in self.recipes:
                    raise ValueError(f"{key}, row {row.title}: no recipe {row.recipe}")
        return self


class Number(BaseModel):
    """One published number, with all that is needed to judge it.

    Attributes:
        table: Key of its table.
        row: Title of its row.
        column: Title of its column.
        metric: Name of the metric in our records.
        value: In our unit: rates as fractions, bytes as GB, time in seconds.
        spread: Standard deviation in the same unit, None where none was published.
        n: Seeds behind it, None where not said.
        kind: First-hand, second-hand or re-run.
        source: Title and place.
        url: Of the source.
        settings: Facts that a run of ours must share.
        unknown: Facts that were not published.
        out_of_reach: Facts that no configuration here has: the number never stands beside ours.
        notes: What else there is to know of the recipe.
        doubt: Why the number itself is doubtful, or None.
        text: As it was printed.
        is_percent: Whether it was printed in per cent.
    """

    model_config = ConfigDict(frozen=True)

    table: str
    row: str
    column: str
    metric: str
    value: float
    spread: float | None
    n: int | None
    kind: SourceClass
    source: str
    url: str
    settings: dict[str, Any]
    unknown: tuple[str, ...]
    out_of_reach: tuple[str, ...]
    notes: tuple[str, ...]
    doubt: str | None
    text: str
    is_percent: bool

    @property
    def mark(self) -> str:
        """The sign of a number that is not first-hand."""
        return MARKS[self.kind]


def parse(text: str) -> Published:
    """Read the text of ``published.yaml``.

    Raises:
        ValueError: naming the entry that is wrong.
    """
    try:
        return Published.model_validate(_as_tuples(yaml.safe_load(text)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "published.yaml"
        raise ValueError(f"{where}: {first['msg']}") from error


@cache
def load() -> Published:
    """Return the numbers that come with the package."""
    file = files("lora_one.reports") / "published.yaml"
    return parse(file.read_text(encoding="utf-8"))


def _as_tuples(value: Any) -> Any:
    """YAML has lists only; a cell is ``value`` or ``[value, spread]``."""
    if isinstance(value, dict):
        return {
            key: {name: _cell(cell) for name, cell in entry.items()}
            if key == "values"
            else _as_tuples(entry)
            for key, entry in value.items()
        }
    return tuple(_as_tuples(entry) for entry in value) if isinstance(value, list) else value


def _cell(cell: Any) -> Any:
    if isinstance(cell, list):
        return tuple(float(part) if isinstance(part, int) else part for part in cell)
    return (float(cell), None) if isinstance(cell, int | float) else cell


def numbers(published: Published, table: str | None = None) -> list[Number]:
    """Return every number of one table, or of all."""
    chosen = published.tables if table is None else {table: published.tables[table]}
    return [
        _number(published, key, one, row, name)
        for key, one in chosen.items()
        for row in one.rows
        for name, cell in row.values.items()
        if cell is not None
    ]


def _number(
    published: Published, key: str, table: PublishedTable, row: PublishedRow, name: str
) -> Number:
    value, spread = row.values[name]
    column, recipe = table.columns[name], published.recipes[row.recipe]
    source = published.sources[row.source]
    # Decimal and not binary hundredths: 85.3 is 0.853.
    scale = 100 if column.unit == "percent" else 1
    settings = recipe.settings | column.settings | row.settings
    return Number(
        table=key,
        row=row.title,
        column=column.title,
        metric=column.metric,
        value=round(value / scale, 10),
        spread=None if spread is None else round(spread / scale, 10),
        n=row.n,
        kind=source.kind,
        source=f"{source.title}, {source.place}",
        url=source.url,
        settings=settings,
        unknown=tuple(fact for fact in recipe.unknown if fact not in settings),
        out_of_reach=recipe.out_of_reach,
        notes=recipe.notes,
        doubt=row.doubts.get(name),
        text=as_printed(value, spread, PERCENT_DIGITS if column.unit == "percent" else None),
        is_percent=column.unit == "percent",
    )


def as_printed(value: float, spread: float | None, digits: int | None = None) -> str:
    """Return a number as tables print it: with so many decimals, or as many as it has."""

    def text(part: float) -> str:
        return f"{part:g}" if digits is None else f"{part:.{digits}f}"

    return text(value) + ("" if spread is None else f" ± {text(spread)}")


def facts_of(group: Group) -> dict[str, Any]:
    """Return what a recipe is compared with: the settings, and the method that ran."""
    return group.settings | {METHOD: group.method}


def mismatches(number: Number, facts: Mapping[str, Any]) -> list[str]:
    """Say which known facts of a number's recipe do not hold, in words.

    Numbers are compared as numbers, so that ``1`` and ``1.0`` are the same number of epochs.
    """
    missing = object()
    wrong = [f"published with {fact}" for fact in number.out_of_reach]
    for key, expected in number.settings.items():
        given = facts.get(key, missing)
        if isinstance(expected, tuple):
            expected = list(expected)
        if (
            given is missing
            or given != expected
            or isinstance(given, bool) != isinstance(expected, bool)
        ):
            shown = "not set" if given is missing else _as_yaml(given)
            wrong.append(f"{key} is {shown}, published {_as_yaml(expected)}")
    return wrong


def _as_yaml(value: Any) -> str:
    """Write a setting as a configuration has it: ``null`` and not ``None``."""
    return value if isinstance(value, str) else json.dumps(value)


def matching(group: Group, candidates: Sequence[Number]) -> list[Number]:
    """Return the numbers whose recipe is that of a group, and whose metric it has."""
    facts, metrics = facts_of(group), group.runs[0].record["metrics"]
    return [
        number
        for number in candidates
        if number.metric in metrics and not mismatches(number, facts)
    ]
