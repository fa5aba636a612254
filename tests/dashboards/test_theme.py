"""Colours, axes and labels."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

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
        marks = ("dense", "triton", "flex", "fa4", "cudnn", "claim")
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
