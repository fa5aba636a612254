"""Recoveries on a time line: how long each part took, and the tokens a second of the training through them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.theme import base_figure, colour
from raybsa.results.record import SeriesPoint

PARTS = {
    "detect": ("struck_at", "noticed_at", "from the blow to the coordinator's knowing"),
    "fill": ("noticed_at", "filled_at", "survivors freed, a worker found for each empty rank"),
    "rebuild": ("filled_at", "formed_at", "the ranks meet"),
    "resume": ("formed_at", "resumed_at", "state is copied to who lacks it"),
}
_HEIGHT, _RIGHT = 320, 24
_PREFIX = "recovery_"


class RecoveryInfo(NamedTuple):
    """One training's recoveries.

    Args:
        origin: when its first step was applied, of ``time.time``; other times are seconds after it.
        parts: for each recovery, seconds of each part; a part that nobody timed is missing.
        spans: (noticed, resumed) of each recovery.
        speed: (seconds, tokens a second), a point a step.
    """

    origin: float
    parts: list[dict[str, float]]
    spans: list[tuple[float, float]]
    speed: list[tuple[float, float]]


def recovery_info(series: Sequence[SeriesPoint], tokens_a_step: int) -> RecoveryInfo | None:
    """The recoveries of the training whose curves these are; None where their times were not recorded."""
    times: dict[int, dict[str, float]] = defaultdict(dict)
    applied: list[tuple[int, float]] = []
    for point in series:
        if point.name == "applied_at":
            applied.append((point.step, point.value))
        elif point.name.startswith(_PREFIX):
            times[point.step][point.name.removeprefix(_PREFIX)] = point.value
    applied.sort()
    rows = [row for _, row in sorted(times.items()) if {"noticed_at", "resumed_at"} <= set(row)]
    if not rows or len(applied) < 2:
        return None
    origin = applied[0][1]
    parts = [{p: row[b] - row[a] for p, (a, b, _) in PARTS.items() if a in row and b in row} for row in rows]
    spans = [(row["noticed_at"] - origin, row["resumed_at"] - origin) for row in rows]
    pairs = pairwise(applied)
    speed = [(at - origin, tokens_a_step / (at - before)) for (_, before), (_, at) in pairs if at > before]
    return RecoveryInfo(origin, parts, spans, speed)


def parts_plot(info: RecoveryInfo) -> go.Figure:
    """A bar a recovery, from the blow to the first step, its parts in order."""
    figure = base_figure(max(_HEIGHT, 88 + 30 * len(info.parts)), _RIGHT)
    names = [str(number) for number in range(1, len(info.parts) + 1)]
    for part, (_, _, meaning) in PARTS.items():
        figure.add_trace(
            go.Bar(
                y=names,
                x=[max(0.0, parts.get(part, 0.0)) for parts in info.parts],
                orientation="h",
                marker={"color": colour(part)},
                hovertemplate=f"{part}: {meaning}<br>%{{x:.3f}} s<extra></extra>",
            )
        )
    figure.update_layout(barmode="stack", bargap=0.35)
    figure.update_xaxes(title_text="seconds")
    figure.update_yaxes(autorange="reversed", title_text="recovery", type="category")
    return figure


def speed_plot(info: RecoveryInfo) -> go.Figure:
    """Tokens a second of every step; shaded from when a failure was noticed to when all ranks could train again."""
    figure = base_figure(_HEIGHT, _RIGHT)
    for noticed, resumed in info.spans:
        figure.add_vrect(x0=noticed, x1=resumed, fillcolor=colour("muted"), opacity=0.2, line_width=0)
    figure.add_trace(
        go.Scatter(
            x=[at for at, _ in info.speed],
            y=[speed for _, speed in info.speed],
            mode="lines+markers",
            line={"color": colour("ink"), "width": 1.5, "shape": "vh"},
            marker={"size": 4},
            hovertemplate="%{x:.2f} s: %{y:,.0f} tokens/s<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="seconds since the first step")
    figure.update_yaxes(title_text="tokens a second", rangemode="tozero", tickformat=",")
    return figure
