"""Pictures: the same bytes every time, no window, and files where they are asked for."""

import subprocess
import sys

import matplotlib as mpl

from lora_one.plot_style import CYCLE, METHOD_COLOURS, Picture, canvas, letter, styled


@styled
def curve(values):
    """One line."""
    figure = canvas()
    axes = figure.subplots()
    axes.plot(values)
    letter(axes, "title", "x", "y")
    return figure


def luminance(colour):
    red, green, blue = mpl.colors.to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


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
    # WCAG contrast of large text and lines would be 3; orange and sky are the known exceptions.
    assert all(1.05 / (luminance(colour) + 0.05) > 1.7 for colour in CYCLE)


def test_the_picture_keeps_itself_out_of_its_own_text():
    assert repr(curve([1])) == "Picture(name='curve')"
