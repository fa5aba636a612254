"""Predicted against measured time of every row of a ring."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.theme import base_figure, colour, density_colour, log_axis

_HEIGHT, _RIGHT = 380, 24


class ErrorPoint(NamedTuple):
    """One row's forward and backward in milliseconds; ``crowded``: ranks shared cores."""

    name: str
    density: float | None
    measured_ms: float
    predicted_ms: float
    crowded: bool


def ring_error_plot(points: Sequence[ErrorPoint]) -> go.Figure:
    """Log-log; on the dotted line both agree. Open points: ranks shared cores."""
    figure = base_figure(_HEIGHT, _RIGHT)
    values = [value for p in points for value in (p.measured_ms, p.predicted_ms)]
    ends = [min(values), max(values)]
    dots = {"color": colour("muted"), "width": 1.5, "dash": "dot"}
    figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=dots, hoverinfo="skip"))
    shades = [density_colour(p.density) for p in points]
    figure.add_trace(
        go.Scatter(
            x=[p.measured_ms for p in points],
            y=[p.predicted_ms for p in points],
            mode="markers",
            marker={
                "color": [colour("card") if p.crowded else s for p, s in zip(points, shades, strict=True)],
                "size": 9,
                "line": {"color": shades, "width": 2},
            },
            text=[escape(p.name) for p in points],
            hovertemplate="%{text}<br>measured %{x:.4~g} ms, predicted %{y:.4~g} ms<extra></extra>",
        )
    )
    figure.update_xaxes(log_axis(values, "measured ms, forward + backward (log scale)"))
    figure.update_yaxes(log_axis(values, "predicted ms (log scale)"))
    return figure
