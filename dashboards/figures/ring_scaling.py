"""Time and efficiency of a ring against its number of ranks: measured points, and forecasts that say so."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.figures.labels import add_end_labels
from dashboards.figures.marks import Mark, marks
from dashboards.theme import base_figure, colour, density_colour, log_axis
from dashboards.wording import number

_HEIGHT, _RIGHT = 380, 228
_LONG_MS = 1e5  # from here on in seconds


class RingPoint(NamedTuple):
    """One step on ``ranks`` ranks, and the same work on one: milliseconds of forward and backward.

    ``crowded``: ranks shared cores, so that they could not be as fast as ranks of their own.
    """

    ranks: int
    ms: float
    alone_ms: float | None
    crowded: bool = False

    @property
    def efficiency(self) -> float | None:
        return None if self.alone_ms is None else self.alone_ms / (self.ranks * self.ms)


class RingLine(NamedTuple):
    """One question over its numbers of ranks, both lists ascending; either may be empty."""

    name: str
    density: float | None
    measured: list[RingPoint]
    forecast: list[RingPoint]


class RingScalingInfo(NamedTuple):
    """Lines that share a figure."""

    lines: list[RingLine]

    @property
    def marks(self) -> list[Mark]:
        """A mark for each line."""
        return marks([density_colour(line.density) for line in self.lines])

    @property
    def shares_colours(self) -> bool:
        return any(mark.point for mark in self.marks)

    @property
    def ranks(self) -> list[int]:
        return sorted({p.ranks for line in self.lines for p in (*line.measured, *line.forecast)})


def ring_scaling_info(lines: Sequence[RingLine]) -> RingScalingInfo | None:
    """The lines that have points, densest last; None without any."""
    some = [line for line in lines if line.measured or line.forecast]
    ordered = sorted(some, key=lambda line: (1.0 if line.density is None else line.density, line.name))
    return RingScalingInfo(ordered) if some else None


def ring_time_plot(info: RingScalingInfo) -> go.Figure:
    """Log-log. Points: measured (open where ranks shared cores); dashes: forecast; dots: one rank's time / ranks.

    Lines of one colour differ in their points and dashes, which stand before their names.
    """
    figure = base_figure(_HEIGHT, _RIGHT)
    points = [p for line in info.lines for p in (*line.measured, *line.forecast)]
    unit, scale = ("s", 1e-3) if max(p.ms for p in points) >= _LONG_MS else ("ms", 1.0)
    for line, mark in zip(info.lines, info.marks, strict=True):
        _add_ideal(figure, line, unit, scale)
        forecast, measured = ([(p, scale * p.ms) for p in some] for some in (line.forecast, line.measured))
        _add_line(figure, line, mark, forecast, measured, unit, ".4~g")
    ideals = [p.alone_ms / p.ranks for p in points if p.alone_ms]
    axis = log_axis(
        [scale * ms for ms in (*(p.ms for p in points), *ideals)], f"{unit}, forward + backward (log scale)"
    )
    _finish(figure, info, axis)
    ends = [log10(scale * _longest(line)[-1].ms) for line in info.lines]
    add_end_labels(figure, _ends(info, ends), axis["range"])
    return figure


def ring_efficiency_plot(info: RingScalingInfo) -> go.Figure:
    """Efficiency: one rank's time for the same work / (ranks × time). 100 % is the ideal."""
    figure = base_figure(_HEIGHT, _RIGHT)
    ends: list[float] = []
    top = 1.05
    for line, mark in zip(info.lines, info.marks, strict=True):
        forecast, measured = (
            [(p, 100 * p.efficiency) for p in points if p.efficiency is not None]
            for points in (line.forecast, line.measured)
        )
        _add_line(figure, line, mark, forecast, measured, "%", ".0f")
        top = max([top, *(value / 100 for _, value in (*forecast, *measured))])
        last = (forecast or measured)[-1:]
        ends.append(last[0][1] if last else 0.0)
    highest = 102 * top
    _finish(figure, info, {"range": [0, highest], "title": {"text": "efficiency, %"}})
    figure.add_hline(y=100, line={"color": colour("muted"), "width": 1.5, "dash": "dot"})
    add_end_labels(figure, _ends(info, ends), [0.0, highest])
    return figure


def _longest(line: RingLine) -> list[RingPoint]:
    return line.forecast or line.measured


def _add_ideal(figure: go.Figure, line: RingLine, unit: str, scale: float) -> None:
    points = [p for p in _longest(line) if p.alone_ms is not None]
    figure.add_trace(
        go.Scatter(
            x=[p.ranks for p in points],
            y=[scale * (p.alone_ms or 0) / p.ranks for p in points],
            mode="lines",
            line={"color": density_colour(line.density), "width": 1, "dash": "dot"},
            hovertemplate=f"{escape(line.name)}, ideal<br>%{{x}} ranks: %{{y:.4~g}} {unit}<extra></extra>",
        )
    )


def _add_line(
    figure: go.Figure,
    line: RingLine,
    mark: Mark,
    forecast: Sequence[tuple[RingPoint, float]],
    measured: Sequence[tuple[RingPoint, float]],
    unit: str,
    form: str,
) -> None:
    shade = density_colour(line.density)
    for points, word in ((forecast, "forecast"), (measured, "measured")):
        if not points:
            continue
        solid = word == "measured"
        marker = {
            "color": [colour("card") if p.crowded else shade for p, _ in points],
            "size": 8,
            "symbol": mark.symbol,
            "line": {"color": shade, "width": 2},
        }
        figure.add_trace(
            go.Scatter(
                x=[p.ranks for p, _ in points],
                y=[value for _, value in points],
                mode="lines+markers" if solid else "lines",
                line={"color": shade, "width": 2, "dash": "solid" if solid else mark.dash},
                marker=marker if solid else None,
                text=[f"{word}, ranks shared cores" if p.crowded else word for p, _ in points],
                hovertemplate=f"{escape(line.name)}<br>%{{x}} ranks: %{{y:{form}}} {unit} (%{{text}})<extra></extra>",
            )
        )


def _finish(figure: go.Figure, info: RingScalingInfo, y_axis: dict) -> None:
    ranks = info.ranks
    figure.update_xaxes(log_axis(ranks, "ranks (log scale)"))
    ticks = ranks[:: -(-len(ranks) // 9)]
    figure.update_xaxes(tickvals=ticks, ticktext=[number(n) if n < 1000 else f"{n:,}" for n in ticks])
    figure.update_yaxes(y_axis)


def _ends(info: RingScalingInfo, places: Sequence[float]) -> list[tuple[float, str, str]]:
    lines = zip(info.lines, info.marks, places, strict=True)
    return [
        (place, mark.beside(line.name, points=bool(line.measured)), density_colour(line.density))
        for line, mark, place in lines
    ]
