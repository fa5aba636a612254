"""The numbers of a front's points: inside each, or one for several that hide one another's, beside the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.theme import colour

_WIDE, _HIGH = 700, 480  # pixels that the points of the figure lie in, about
_LETTER = 7


class Place(NamedTuple):
    """Where a point lies on the figure's axes (log10 where one is logarithmic), and its diameter in pixels."""

    x: float
    y: float
    diameter: float


def front_numbers(front: Sequence[Place], every: Sequence[Place]) -> list[str]:
    """The number of each point from 1. Of neighbours in a row that would hide one another's, the last has them all, as
    ``1–3``, and the others have none. ``every``: all points of the figure, which say how far its axes reach."""
    wide = _WIDE / (_span([place.x for place in every]) or 1)
    high = _HIGH / (_span([place.y for place in every]) or 1)
    labels: list[str] = []
    first = 1
    for number, here in enumerate(front, 1):
        after = front[number] if number < len(front) else None
        apart = hypot(wide * (after.x - here.x), high * (after.y - here.y)) if after else float("inf")
        hidden = after is not None and apart < after.diameter / 2 + _LETTER
        labels.append("" if hidden else str(number) if number == first else f"{first}–{number}")
        first = first if hidden else number + 1
    return labels


def inside(label: str) -> str:
    """The label, where it is one number."""
    return "" if "–" in label else label


def add_joint_numbers(figure: go.Figure, front: Sequence[Place], labels: Sequence[str], *, below: bool) -> None:
    """Left of the points, and below or above: on the side where what lay there would have beaten them."""
    for place, label in zip(front, labels, strict=True):
        if inside(label) != label:
            figure.add_annotation(
                x=place.x,
                y=place.y,
                text=label,
                showarrow=False,
                xanchor="right",
                xshift=-place.diameter / 3,
                yshift=(-1 if below else 1) * (place.diameter / 2 + 4),
                font={"size": 11, "weight": 700, "color": colour("ink")},
            )


def _span(values: Sequence[float]) -> float:
    return max(values) - min(values)
