"""A trial's peak memory beside dense attention's."""

from __future__ import annotations

import plotly.graph_objects as go

from dashboards.theme import base_figure, colour, density_colour
from dashboards.wording import size, unit_of
from raybsa.results.record import Record

_HEIGHT, _RIGHT = 190, 90


def trial_memory_plot(record: Record) -> go.Figure | None:
    """A bar for the trial and one for dense attention on the same shapes; None where neither was measured."""
    measured = [
        ("dense", record.dense_peak_bytes, colour("dense")),
        ("this trial", record.peak_bytes, density_colour(record.density)),
    ]
    bars = [(name, value, shade) for name, value, shade in measured if value is not None]
    if not bars:
        return None
    unit, name = unit_of(max(value for _, value, _ in bars))
    figure = base_figure(_HEIGHT, _RIGHT)
    figure.add_trace(
        go.Bar(
            orientation="h",
            y=[name for name, _, _ in bars],
            x=[value / unit for _, value, _ in bars],
            marker={"color": [shade for _, _, shade in bars]},
            text=[size(value) for _, value, _ in bars],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    )
    figure.update_layout(bargap=0.4)
    figure.update_xaxes(title_text=f"{name} beyond the inputs, forward + backward", rangemode="tozero")
    return figure
