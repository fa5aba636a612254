"""Colours, axes and labels."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import numpy as np
import pytest

from dashboards.figures.peers import SYMBOLS
from dashboards.theme import DENSITY_LABELS, PALETTE, density_class, log_axis, log_ticks, spread


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG 2.1, from 1 to 21."""

    def luminance(shade: str) -> float:
        parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_marks_stand_out_from_both_backgrounds(theme: int) -> None:
    for ground in ("paper", "card"):
        marks = ("dense", "triton", "flex", "fa4", "cudnn", "claim", "own", "rival", "topk", "int8", "cast")
        wanted_of = {"ink": 7, "muted": 4.5, **dict.fromkeys(marks, 3), **{f"density{i}": 2.5 for i in range(6)}}
        for meaning, wanted in wanted_of.items():
            assert contrast(PALETTE[meaning][theme], PALETTE[ground][theme]) >= wanted, (meaning, ground)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_neighbouring_densities_differ_in_luminance_in_one_direction(theme: int) -> None:
    against_paper = [contrast(PALETTE[f"density{i}"][theme], PALETTE["paper"][theme]) for i in range(6)]
    assert all(after > 1.15 * before for before, after in pairwise(against_paper))


def test_no_light_colour_has_two_meanings() -> None:
    lights = [light for light, _ in PALETTE.values()]
    assert len(set(lights)) == len(lights)


# Linear RGB as protanopes and deuteranopes see it: Machado, Oliveira, Fernandes, "A Physiologically-based Model for
# Simulation of Color Vision Deficiency" (2009), severity 1.
SEEN_BY = {
    "most": np.eye(3),
    "protanopes": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopes": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
# Linear RGB -> OKLab: Ottosson, "A perceptual color space for image processing" (2020).
TO_LMS = np.array(
    [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
)
TO_LAB = np.array(
    [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
)


def difference(first: str, second: str, eyes: str) -> float:
    """The distance in OKLab; black and white are 1 apart."""

    def lab(shade: str) -> np.ndarray:
        parts = np.array([int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return TO_LAB @ np.cbrt(TO_LMS @ np.clip(SEEN_BY[eyes] @ linear, 0, 1))

    return float(np.linalg.norm(lab(first) - lab(second)))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    "meanings",
    [
        ("compute", "transfer", "wait"),
        ("detect", "fill", "rebuild", "resume"),
        ("dense", "own", "rival", "cast", "topk", "int8"),
    ],
    ids=["a timeline", "recoveries", "codecs and two runs"],
)
def test_meanings_of_one_figure_differ_for_all_eyes(meanings: tuple[str, ...], theme: int) -> None:
    for first, second in combinations(meanings, 2):
        for eyes, wanted in (("most", 0.1), ("protanopes", 0.07), ("deuteranopes", 0.07)):
            found = difference(PALETTE[first][theme], PALETTE[second][theme], eyes)
            assert found >= wanted, f"{first} and {second} differ by {found:.3f} for {eyes}, wanted {wanted}"


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_libraries_of_one_figure_differ_and_where_some_eyes_see_less_their_symbols_do(theme: int) -> None:
    names = ("triton", "flex", "fa4", "cudnn", "dense")
    for first, second in combinations(names, 2):
        assert difference(PALETTE[first][theme], PALETTE[second][theme], "most") >= 0.1, (first, second)
    assert len({SYMBOLS.get(name, "diamond") for name in names}) == len(names)


def test_the_density_classes_are_those_of_their_labels() -> None:
    edges = [float(label.strip("≤ >%")) / 100 for label in DENSITY_LABELS[:-1]]
    assert [density_class(edge) for edge in edges] == [0, 1, 2, 3, 4]
    assert [density_class(edge + 1e-6) for edge in edges] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("span", [1.32, 1.5, 2, 3, 7, 12, 50, 1000, 1e6])
@pytest.mark.parametrize("low", [0.0031, 0.97, 1.06, 2.3, 5.01, 7.6, 9.1, 3200])
def test_any_log_axis_has_a_few_round_ticks_inside_it(low: float, span: float) -> None:
    ticks = log_ticks(low, low * span)
    assert 2 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= low * span * (1 + 1e-9) for tick in ticks)
    assert all(float(f"{tick:.2g}") == pytest.approx(tick) for tick in ticks)


def test_a_log_axis_holds_all_values_even_when_they_are_equal() -> None:
    axis = log_axis([5.0, 5.0], "x")
    assert axis["range"][0] < math.log10(5) < axis["range"][1]
    assert axis["ticktext"] == [f"{tick:,.6g}" for tick in axis["tickvals"]]


def test_labels_keep_their_order_and_their_distance() -> None:
    assert spread([1.0, 5.0, 3.0], 1.0) == [1.0, 5.0, 3.0]
    assert spread([2.0, 2.0, 2.1], 1.0) == [2.0, 3.0, 4.0]
    assert spread([9.5, 9.6, 2.0], 1.0, high=10.0) == [9.0, 10.0, 2.0]
