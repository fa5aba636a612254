"""Names that a figure has room for, and names at the right end of lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from dashboards.theme import spread

_SHIFT, _LETTER = 6, 6.9  # pixels; of a letter of these labels on average


def add_end_labels(figure: go.Figure, ends: Sequence[tuple[float, str, str]], y_range: Sequence[float]) -> None:
    """A name beside each (place on the y axis, name, colour), moved apart so that none covers another.

    Places and ``y_range`` are log10 of the values where the axis is logarithmic. A name too long for the figure's right
    margin is shortened.
    """
    most = int((figure.layout.margin.r - _SHIFT) / _LETTER)
    gap = (y_range[1] - y_range[0]) * 16 / (figure.layout.height - 72)
    places = spread([place for place, _, _ in ends], gap, y_range[1])
    made = [
        {
            "x": 1,
            "xref": "paper",
            "y": place,
            "text": escape(shortened(name, most), quote=False),
            "xanchor": "left",
            "xshift": _SHIFT,
            "showarrow": False,
            "font": {"color": shade, "size": 12},
        }
        for (_, name, shade), place in zip(ends, places, strict=True)
    ]
    figure.update_layout(annotations=[*figure.layout.annotations, *made])


def shortened(name: str, most: int) -> str:
    """At most so many letters: parameters in parentheses go first, then the end."""
    if len(name) > most:
        name = re.sub(r"\(.*\)", "", name)
    return name if len(name) <= most else f"{name[: most - 1]}…"
