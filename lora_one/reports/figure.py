"""What a plot shows, as numbers: matplotlib and the page draw the same figures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_one.reports.groups import Group
from lora_one.reports.style import hues
from lora_one.reports.traces import Trace

DIGITS = 5


@dataclass(frozen=True)
class Series:
    """One line or one cloud of points.

    Attributes:
        name: In the legend; series of the same name are switched together.
        method: Decides the colour.
        optimiser: Decides dashes and marker.
        kind: ``line``, ``points`` or ``front`` (a staircase through what nothing beats).
        x: Places.
        y: Values.
        low: Lower end of a band or error bar, or nothing.
        high: Upper end of it.
        labels: What hovering over each point says, or nothing.
        faint: Drawn small, behind the others.
    """

    name: str
    method: str
    optimiser: str
    kind: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    faint: bool = False


@dataclass(frozen=True)
class Figure:
    """A plot.

    Attributes:
        key: Names its files.
        title: What it shows.
        x_label: With the unit.
        y_label: With the unit.
        caption: What lines, bands and points are, and what was left out.
        series: In drawing order.
        x_log: Logarithmic axis.
        y_log: Logarithmic axis.
        rows: Names of rows, where y only counts rows.
    """

    key: str
    title: str
    x_label: str
    y_label: str
    caption: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    rows: tuple[str, ...] = ()

    @property
    def hues(self) -> list[str]:
        """The method whose colour each series has, see ``style.hues``."""
        return hues([(one.name, one.method, one.optimiser) for one in self.series])


@dataclass(frozen=True)
class Evidence:
    """What was read of the runs that stand for their arms.

    Attributes:
        traces: Folder name -> ``metrics.jsonl``.
        inits: Folder name -> ``init.json``.
    """

    traces: Mapping[str, Trace]
    inits: Mapping[str, dict[str, Any]]

    def traces_of(self, group: Group) -> list[Trace]:
        """Return what is known of a group's runs."""
        names = [run.folder.name for run in group.runs]
        return [self.traces[name] for name in names if name in self.traces]


def to_json(figure: Figure) -> dict[str, Any]:
    """Return a figure for the page, its numbers to five significant digits."""
    series = [
        {
            "name": one.name,
            "hue": hue,
            "optimiser": one.optimiser,
            "kind": one.kind,
            "faint": one.faint,
            "x": rounded(one.x),
            "y": rounded(one.y),
            "low": rounded(one.low),
            "high": rounded(one.high),
            "labels": one.labels,
        }
        for one, hue in zip(figure.series, figure.hues, strict=True)
    ]
    return {
        "key": figure.key,
        "title": figure.title,
        "xLabel": figure.x_label,
        "yLabel": figure.y_label,
        "caption": figure.caption,
        "xLog": figure.x_log,
        "yLog": figure.y_log,
        "series": series,
    }


def rounded(values: Sequence[float]) -> list[float]:
    """Round to five significant digits, more than any plot can show."""
    return [float(f"{value:.{DIGITS}g}") for value in values]


def slug(text: str) -> str:
    """Return text as it can stand in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
