"""How the pictures of ``lora_one.theory`` look: fonts, colours, sizes, and how they become files.

Figures are made without pyplot, on the Agg canvas: no window, no global state, the same pixels on
a cluster node, in a notebook and in a test. Colours are those of Okabe and Ito (2008), which
people with any common colour blindness tell apart; series also differ in marker or line style.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

BLACK = "#000000"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
YELLOW = "#F0E442"
BLUE = "#0072B2"
RED = "#D55E00"
PINK = "#CC79A7"
GREY = "#7F7F7F"

METHOD_COLOURS = {
    "lora": BLACK,
    "pissa": GREEN,
    "lora_ga": ORANGE,
    "lora_one": BLUE,
    "full_ft": RED,
}
"""One hue per method, the same as in the reports (``lora_one.reports.style``)."""

CYCLE = (BLUE, RED, GREEN, ORANGE, PINK, SKY, BLACK)
"""For series that are no methods; yellow is left out, since it is too pale for a line."""

SEQUENTIAL = "viridis"
"""Colour map for magnitudes: even in lightness, also in grey."""

STYLE = {
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": mpl.cycler(color=CYCLE),
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "lines.linewidth": 2.0,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.hashsalt": "lora-one",  # the same file for the same picture
    "svg.fonttype": "none",
}

FIGURES_VARIABLE = "LORA_ONE_FIGURES"
"""Environment variable: a folder where ``finish`` also writes every picture as PNG and SVG."""


@contextmanager
def style() -> Iterator[None]:
    """Apply ``STYLE`` to figures that are made and drawn inside."""
    with mpl.rc_context(STYLE):
        yield


def styled(function: Callable[..., Figure]) -> Callable[..., "Picture"]:
    """Make a function that draws into a new figure return the finished picture.

    The picture's name is the function's.
    """

    def draw(*arguments: object, **options: object) -> Picture:
        with style():
            return finish(function(*arguments, **options), function.__name__)

    draw.__doc__, draw.__name__ = function.__doc__, function.__name__
    draw.__wrapped__ = function
    return draw


def canvas(columns: int = 1, rows: int = 1, *, width: float = 4.6, height: float = 3.8) -> Figure:
    """Return an empty figure for ``rows`` x ``columns`` panels of this size in inches."""
    figure = Figure(figsize=(columns * width, rows * height))
    FigureCanvasAgg(figure)
    return figure


@dataclass(frozen=True)
class Picture:
    """A finished picture; notebooks show it by ``_repr_png_``.

    Attributes:
        name: for its files.
        figure: the figure.
        png: its PNG file.
    """

    name: str
    figure: Figure = field(repr=False)
    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png

    def save(self, folder: str | Path) -> None:
        """Write ``<name>.png`` and ``<name>.svg``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.png").write_bytes(self.png)
        # Without a date, and with the style's salt, the same picture gives the same file.
        with style():
            self.figure.savefig(folder / f"{self.name}.svg", metadata={"Date": None})


def finish(figure: Figure, name: str) -> Picture:
    """Draw a figure; also save it where ``LORA_ONE_FIGURES`` names a folder."""
    drawn, packed = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    # 256 colours are enough for diagrams and make a third of the file.
    Image.open(drawn).convert("RGB").quantize(256).save(packed, format="png", optimize=True)
    picture = Picture(name, figure, packed.getvalue())
    if folder := os.environ.get(FIGURES_VARIABLE):
        picture.save(folder)
    return picture


def letter(axes: Axes, title: str, x: str, y: str) -> None:
    """Give a panel its title and axis labels."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
