"""One look for every plot: colours that a colour-blind reader can tell apart, light and dark.

The hues are those of Okabe and Ito (2008), https://jfly.uni-koeln.de/color/, darkened for lines on
white and lightened for lines on near black, so that each has a contrast of at least 3 : 1 with its
background; the red is deeper than theirs, since their darkened orange would come too near.
A method has one colour everywhere; an optimiser has a dash pattern and a marker as well, so that no
plot depends on colour alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Theme:
    """Colours of one background.

    Attributes:
        background: Of page and plot.
        text: Letters and axes.
        muted: Secondary text.
        grid: Lines behind the data.
        palette: Of the data, in the order of ``METHOD_ORDER``.
    """

    background: str
    text: str
    muted: str
    grid: str
    palette: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    text="#1c2126",
    muted="#5c6670",
    grid="#e3e7eb",
    palette=(
        "#0072b2",
        "#1c2126",
        "#008a66",
        "#c98500",
        "#a8102a",
        "#b4528c",
        "#3a93c9",
        "#6b7580",
    ),
)
DARK = Theme(
    background="#14181c",
    text="#e8ebee",
    muted="#9aa5b0",
    grid="#2b3239",
    palette=(
        "#4ea8de",
        "#f2f4f6",
        "#1fae86",
        "#f0b429",
        "#f4604f",
        "#e08fc0",
        "#8fd0f5",
        "#9aa5b0",
    ),
)
# These methods have one hue in every picture, also in the notebook's; others take what is left.
METHOD_ORDER = ("lora_one", "lora", "pissa", "lora_ga", "full_ft")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 2), (8, 2, 2, 2), (4, 1, 1, 1, 1, 1))


def colour_indices(methods: Sequence[str]) -> dict[str, int]:
    """Return for each method its place in a palette.

    More methods than colours share some: their markers and names still tell them apart.
    """
    others = [name for name in dict.fromkeys(methods) if name not in METHOD_ORDER]
    known = {name: place for place, name in enumerate(METHOD_ORDER)}
    free = len(LIGHT.palette) - len(METHOD_ORDER)
    return known | {name: len(METHOD_ORDER) + at % free for at, name in enumerate(others)}


def hues(arms: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return the method whose colour each arm has; "" for grey.

    Where arms share a method and an optimiser, as LoRA and rsLoRA do, the first by name has the
    colour.

    Args:
        arms: Name, method and optimiser.
    """
    names: dict[tuple[str, str], str] = {}
    for name, *kind in sorted(arms):
        names.setdefault(tuple(kind), name)
    return [method if names[method, optimiser] == name else "" for name, method, optimiser in arms]


def css_variables() -> str:
    """Return the themes as CSS: light, dark where the system or the reader says so."""
    light = _variables(LIGHT) + (
        "--raised:#ffffff;--edge:#d5dbe0;--hover:#f3f6f8;--hover-solid:#f3f6f8;--well:#f3f6f8;"
        "--link:#005a94;--good:#00694d;--bad:#b3261e;--warn:#d9a400;--warn-text:#8a5a00;"
        "color-scheme:light;"
    )
    dark = _variables(DARK) + (
        "--raised:#1a1f24;--edge:#343c44;--hover:#222930;--hover-solid:#222930;--well:#12161a;"
        "--link:#7cc0f0;--good:#4fd1a5;--bad:#ff8a80;--warn:#c99a1e;--warn-text:#e6b84d;"
        "color-scheme:dark;"
    )
    return (
        f":root{{{light}}}\n"
        f':root[data-theme="dark"]{{{dark}}}\n'
        f'@media (prefers-color-scheme: dark){{:root:not([data-theme="light"]){{{dark}}}}}\n'
    )


def _variables(theme: Theme) -> str:
    named = {
        "background": theme.background,
        "text": theme.text,
        "muted": theme.muted,
        "grid": theme.grid,
    }
    named |= {f"series-{index}": colour for index, colour in enumerate(theme.palette)}
    return "".join(f"--{name}:{colour};" for name, colour in named.items())


def matplotlib_settings(theme: Theme = LIGHT) -> dict[str, Any]:
    """Return what ``matplotlib.rc_context`` takes."""
    return {
        "figure.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.muted,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "axes.grid": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9.5,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        # Long enough for two dashes of the longest pattern.
        "legend.handlelength": 4.0,
        "lines.linewidth": 1.6,
        "lines.markersize": 5,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "figure.dpi": 100,
        "savefig.dpi": 160,
        "svg.fonttype": "path",
        # The same input gives the same file.
        "svg.hashsalt": "lora-one",
    }
