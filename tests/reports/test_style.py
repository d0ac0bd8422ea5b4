"""Colours that can be seen on their background, and told apart."""

import itertools

import pytest

from lora_one.reports.style import DARK, LIGHT, METHOD_ORDER, colour_indices, css_variables, hues

# The page draws on a raised surface, a little lighter than the dark page.
SURFACES = [(LIGHT, "#ffffff"), (DARK, "#1a1f24")]


def linear(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]


def luminance(colour):
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("theme", "surface"), SURFACES, ids=["light", "dark"])
def test_every_line_stands_out(theme, surface):
    """WCAG 1.4.11 asks for 3 : 1 of what a reader must see in a plot."""
    assert surface in css_variables()
    for colour in theme.palette:
        low, high = sorted((luminance(colour), luminance(surface)))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


# Viénot, Brettel and Mollon (1999), linear RGB as people without red or green cones see it.
BLINDNESS = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_the_methods_differ_also_without_red_or_green_cones(theme, kind):
    seen = [
        [sum(w * v for w, v in zip(row, linear(colour), strict=True)) for row in BLINDNESS[kind]]
        for colour in theme.palette[: len(METHOD_ORDER)]
    ]
    gamma = [[max(value, 0) ** (1 / 2.2) for value in colour] for colour in seen]
    for one, other in itertools.combinations(gamma, 2):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.1


def test_a_method_has_its_colour_whatever_else_is_there():
    assert colour_indices(["pissa"])["lora_one"] == colour_indices(["olora", "lora"])["lora_one"]
    many = colour_indices([f"m{index}" for index in range(20)])
    assert max(many.values()) < len(LIGHT.palette)
    assert len({many["m0"], many["m1"], *(many[name] for name in METHOD_ORDER)}) == 7


def test_of_two_arms_of_one_method_the_first_by_name_has_its_colour():
    arms = [("rsLoRA", "lora", "adamw"), ("LoRA", "lora", "adamw"), ("LoRA", "lora", "sgd")]
    assert hues(arms) == ["", "lora", "lora"]
    assert hues([*arms, *arms]) == 2 * hues(arms)
