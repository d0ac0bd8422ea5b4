"""Pictures: the same bytes every time, no window, and files where they are asked for."""

import subprocess
import sys

import matplotlib as mpl

from lora_one.plot_style import (
    CYCLE,
    METHOD_COLOURS,
    ORANGE,
    SKY,
    Picture,
    canvas,
    letter,
    styled,
)


@styled
def curve(values):
    """One line."""
    figure = canvas()
    axes = figure.subplots()
    axes.plot(values)
    letter(axes, "title", "x", "y")
    return figure


def contrast_on_white(colour):
    """WCAG 2's contrast ratio."""
    channels = mpl.colors.to_rgb(colour)
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 1.05 / (luminance + 0.05)


def test_the_same_data_give_the_same_file(tmp_path):
    first, second = curve([1, 2, 3]), curve([1, 2, 3])
    assert isinstance(first, Picture)
    assert first.png == second.png
    assert first.png.startswith(b"\x89PNG")
    assert first.name == "curve"
    first.save(tmp_path / "a")
    second.save(tmp_path / "b")
    svg = "curve.svg"
    assert (tmp_path / "a" / svg).read_bytes() == (tmp_path / "b" / svg).read_bytes()


def test_pictures_are_saved_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_ONE_FIGURES", str(tmp_path / "new"))
    curve([1, 2])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["curve.png", "curve.svg"]


def test_style_and_backend_stay_as_they_were():
    before = dict(mpl.rcParams)
    curve([1, 2])
    assert dict(mpl.rcParams) == before
    script = "import sys, lora_one.plot_style; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_colours_differ_and_can_be_read_on_white():
    assert len(set(METHOD_COLOURS.values())) == len(METHOD_COLOURS)
    assert len(set(CYCLE)) == len(CYCLE)
    # WCAG asks 3 of large text; orange and sky, which the palette needs, are just above 2.
    ratios = {colour: contrast_on_white(colour) for colour in CYCLE}
    assert min(ratios.values()) > 2
    assert {colour for colour, ratio in ratios.items() if ratio < 3} == {ORANGE, SKY}


def test_the_picture_keeps_itself_out_of_its_own_text():
    assert repr(curve([1])) == "Picture(name='curve')"
