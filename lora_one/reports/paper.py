"""A published table with our rows beside it: ``--paper lora_one/table2``."""

from collections.abc import Sequence

from lora_one.errors import InputError, nearest
from lora_one.reports.groups import Group
from lora_one.reports.published import (
    MARK_WORDS,
    Number,
    Published,
    facts_of,
    matching,
    mismatches,
    numbers,
)
from lora_one.reports.statistics import mean, sd
from lora_one.reports.table import Results


def require_table(published: Published, key: str) -> None:
    """Raise InputError, with the nearest name and all names, unless the table exists."""
    if key not in published.tables:
        raise InputError(
            f"--paper {key}: there is no such table.{nearest(key, published.tables)} "
            f"Tables: {', '.join(sorted(published.tables))}."
        )


def beside(published: Published, key: str, groups: Sequence[Group]) -> Results:
    """Return the table: a published row, and below it every row of ours with the same recipe.

    Ours is per column, since a column is another data set; several settings of ours that match
    (a rate that was not published) are several rows. Notes say what no run matches, and why.
    """
    table = published.tables[key]
    columns = ["row", "whose", *(column.title for column in table.columns.values())]
    rows: list[list[str]] = []
    notes = [table.title]
    for row in table.rows:
        source = published.sources[row.source]
        cells = {
            number.column: number for number in numbers(published, key) if number.row == row.title
        }
        shown = [_published(cells.get(column.title)) for column in table.columns.values()]
        rows.append([row.title, f"{source.title.split(' (')[0]}, {source.kind}", *shown])
        ours = {
            column.title: [
                (group, cells[column.title])
                for group in groups
                if column.title in cells and matching(group, [cells[column.title]])
            ]
            for column in table.columns.values()
        }
        for at in range(max(map(len, ours.values()))):
            rows.append([row.title, "ours", *(_ours(found, at) for found in ours.values())])
        if not any(ours.values()):
            notes.append(f"{row.title}: {_why_not(list(cells.values()), groups)}")
        notes += [f"{row.title}, {n.column}: {n.doubt}" for n in cells.values() if n.doubt]
    recipes = {row.recipe: published.recipes[row.recipe] for row in table.rows}
    for recipe in recipes.values():
        notes += [f"recipe: {recipe.title}", *recipe.notes]
        if recipe.unknown:
            notes.append(f"not published: {', '.join(recipe.unknown)}")
        if recipe.out_of_reach:
            notes.append(f"no run here can have: {', '.join(recipe.out_of_reach)}")
    notes.append(MARK_WORDS)
    places = {row.source: published.sources[row.source] for row in table.rows}
    notes += [f"source: {one.title}, {one.place}, {one.url}" for one in places.values()]
    return Results(columns, rows, notes)


def _published(number: Number | None) -> str:
    return "–" if number is None else f"{number.text}{number.mark}{'?' if number.doubt else ''}"


def _ours(found: Sequence[tuple[Group, Number]], at: int) -> str:
    """Our mean and spread, in the unit in which the number was printed."""
    if at >= len(found):
        return "–"
    group, number = found[at]
    values = [value for value in group.values(number.metric) if value is not None]
    scale = 100 if number.is_percent else 1
    spread = sd(values)
    text = f"{scale * mean(values):.2f}" + ("" if spread is None else f" ± {scale * spread:.2f}")
    rate = "" if group.learning_rate is None else f", lr {group.learning_rate:g}"
    return f"{text} (n = {len(values)}{rate})"


def _why_not(wanted: Sequence[Number], groups: Sequence[Group]) -> str:
    """Say what keeps the run that is nearest to a row from standing beside it."""
    if not groups:
        return "no finished run"
    found = [
        mismatches(number, facts_of(group)) or [f"{number.metric} was not measured"]
        for number in wanted
        for group in groups
    ]
    if not found:
        return "no published number"
    closest = min(found, key=len)
    more = f" and {len(closest) - 3} more" if len(closest) > 3 else ""
    return f"no run has this recipe; the nearest: {'; '.join(closest[:3])}{more}"
