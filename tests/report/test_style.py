"""The colours of pictures can be told apart by the colour-blind, and lines be seen on white."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from lobra.report.style import (
    COLOURS,
    COMPARED,
    GROUND,
    MARKERS,
    OURS,
    SCALE,
    VERMILLION,
    curve,
    draw,
    make_axes,
    shortened,
)

# What people see who lack a cone, in linear sRGB: Machado, Oliveira and Fernandes, "A
# physiologically-based model for simulation of color vision deficiency" (2009), severity 1.0.
SIGHT = {
    "usual": np.eye(3),
    "protanopia": np.array([
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]),
    "deuteranopia": np.array([
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]),
    "tritanopia": np.array([
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ]),
}  # fmt: skip
# Of CIE 1976 L*a*b*: 2.3 is just noticeable side by side; thin lines apart need several times that.
APART = 15.0


def linear(colour: str) -> np.ndarray:
    """Return a colour's linear sRGB (IEC 61966-2-1)."""
    coded = np.array(to_rgb(colour))
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def lab(colour: str, sight: str) -> np.ndarray:
    """Return a colour as somebody sees it, in CIE 1976 L*a*b* under D65."""
    to_xyz = np.array([
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ])  # fmt: skip
    seen = np.clip(SIGHT[sight] @ linear(colour), 0, 1)
    share = to_xyz @ seen / to_xyz.sum(axis=1)
    root = np.where(share > (6 / 29) ** 3, np.cbrt(share), share / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


def apart(one: str, two: str, sight: str) -> float:
    return float(np.linalg.norm(lab(one, sight) - lab(two, sight)))


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_are_told_apart_whatever_the_sight(sight: str) -> None:
    nearest = min(apart(one, two, sight) for one, two in combinations(COLOURS, 2))
    assert nearest >= APART
    for one, two in ((OURS, COMPARED), (OURS, GROUND), (COMPARED, GROUND), (OURS, VERMILLION)):
        assert apart(one, two, sight) >= 2 * APART
    scale = colormaps[SCALE](np.linspace(0, 1, 9))
    light = [lab(tuple(colour[:3]), sight)[0] for colour in scale]
    assert all(np.diff(light) < 0), "the darker, the more"


def test_a_gray_print_tells_what_is_ours_from_the_ground() -> None:
    assert abs(lab(OURS, "usual")[0] - lab(GROUND, "usual")[0]) > 30


@pytest.mark.parametrize("colour", [*COLOURS, COMPARED])
def test_a_line_is_seen_on_white(colour: str) -> None:
    luminance = float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour))
    assert 1.05 / (luminance + 0.05) >= 2.0  # contrast as in WCAG 2.2


def test_the_model_of_sight_keeps_greys_and_confuses_what_it_should() -> None:
    for sight in SIGHT:
        assert apart("#808080", "#808080", "usual") == 0
        assert np.linalg.norm(lab("#808080", sight) - lab("#808080", "usual")) < 1
    assert apart("#FF0000", "#00C000", "usual") > 2 * apart("#FF0000", "#00C000", "deuteranopia")


def test_curves_differ_in_colour_and_in_marker_and_only_then_repeat_one() -> None:
    looks = [tuple(curve(number).values()) for number in range(len(COLOURS) * len(MARKERS))]
    assert len(set(looks)) == len(looks)
    assert len({colour for colour, _ in looks[:7]}) == len({mark for _, mark in looks[:7]}) == 7


def test_a_picture_has_the_format_of_its_name(tmp_path: Path) -> None:
    for name, begins in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        path = draw(tmp_path / name, lambda: make_axes()[0])
        assert path.read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir() if "a." not in path.name] == []


def test_a_long_name_keeps_both_ends() -> None:
    assert shortened("short", 9) == "short"
    assert shortened("customer_0042_v7", 9) == "cust…2_v7"
