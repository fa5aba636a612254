"""Quality against latency: what is worth having, what is beaten, and where the dense baseline stands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Literal, NamedTuple

import plotly.graph_objects as go

from dashboards.figures.front_numbers import Place, add_joint_numbers, front_numbers, inside
from dashboards.frames import Trial
from dashboards.theme import base_figure, colour, density_colour, log_axis
from dashboards.wording import milliseconds, quality, ratio
from raybsa.results.pareto import FORWARD_LATENCY, LATENCY, Objective, pareto_front, quality_objective

_CROWD, MOST_NUMBERS = 300, 40  # points from which on they shrink, and numbers that can still be read
MOST_BEATEN, _GRID = 1500, (60, 40)  # dominated points that are all drawn, and the cells that hold one of more
_SMALLEST, _LARGEST = 17.0, 38.0


class Point(NamedTuple):
    """One trial in the picture. ``rank`` counts the front from the fastest, from 1; None is off the front."""

    trial: Trial
    latency_ms: float
    quality: float
    rank: int | None
    diameter: float

    @property
    def place(self) -> Place:
        """In the picture, whose first axis is logarithmic."""
        return Place(math.log10(self.latency_ms), self.quality, self.diameter)


class ParetoInfo(NamedTuple):
    """``unmeasured`` trials have a quality and no latency."""

    quality_name: str
    goal: Literal["min", "max"]
    latency: Objective
    points: list[Point]
    unmeasured: int

    @property
    def quality_label(self) -> str:
        return self.quality_name.replace("_", " ")

    @property
    def latency_label(self) -> str:
        return "forward + backward" if self.latency is LATENCY else "forward"

    def speed_up(self, point: Point) -> float | None:
        """Dense's time, measured in the point's own run, over the point's; None where dense was not measured."""
        record = point.trial.record
        dense = record.dense_forward_backward_ms_p50 if self.latency is LATENCY else record.dense_forward_ms_p50
        return ratio(dense, point.latency_ms)

    @property
    def front(self) -> list[Point]:
        """Fastest first."""
        ranked = [point for point in self.points if point.rank is not None]
        return sorted(ranked, key=lambda point: point.rank or 0)


def pareto_info(trials: Sequence[Trial]) -> ParetoInfo:
    """The front of trials that answer one question (all have a finite quality). The dense baseline takes part in it.

    Latency is forward and backward together, or forward alone where no trial measured both.
    """
    first = trials[0].record
    goal: Literal["min", "max"] = "max" if first.quality_goal == "max" else "min"
    both = any(LATENCY.value(trial.record) is not None for trial in trials)
    latency = LATENCY if both else FORWARD_LATENCY
    timed = [trial for trial in trials if latency.value(trial.record) is not None]
    front = pareto_front([trial.record for trial in timed], [latency, quality_objective(goal)])
    ranks = {record.trial_id: rank for rank, record in enumerate(front, 1)}
    diameters = _diameters([trial.record.peak_bytes for trial in timed])
    beaten, best = _shrunk(len(timed)), _shrunk(len(front))
    points = [
        Point(
            t,
            float(latency.value(t.record) or 0),
            float(t.record.quality or 0),
            ranks.get(t.id),
            diameter * (best if t.id in ranks else beaten),
        )
        for t, diameter in zip(timed, diameters, strict=True)
    ]
    return ParetoInfo(first.quality_name or "quality", goal, latency, points, len(trials) - len(timed))


def pareto_plot(info: ParetoInfo) -> go.Figure:
    """Filled points form the front, numbered as far as numbers can be read. The area of a point is its peak memory, its
    colour its density."""
    figure = base_figure(600)
    better = "lower" if info.goal == "min" else "higher"
    figure.update_xaxes(
        log_axis(
            [p.latency_ms for p in info.points],
            f"attention {info.latency_label}, median (ms, log scale; lower is better)",
        )
    )
    figure.update_yaxes(title_text=f"{escape(info.quality_label)} ({better} is better)")
    _add_front_line(figure, info.front)
    beaten = thinned([p for p in info.points if p.rank is None and not p.trial.is_dense and not p.trial.pruned])
    pruned = [p for p in info.points if p.trial.pruned]
    best = [p for p in info.front if not p.trial.is_dense]
    dense = [p for p in info.points if p.trial.is_dense]
    places = [p.place for p in info.front] if len(info.front) <= MOST_NUMBERS else []
    labels = front_numbers(places, [p.place for p in info.points])
    numbers = {p.trial.id: inside(label) for p, label in zip(info.front, labels, strict=False)}
    grey = colour("dominated")
    _add_points(figure, "dominated", beaten, "rgba(0,0,0,0)", grey)
    if pruned:
        _add_points(figure, "stopped early", pruned, grey, grey, symbol="x-thin")
    fills = [density_colour(p.trial.density) for p in best]
    _add_points(figure, "front", best, fills, colour("paper"), numbers=numbers)
    _add_points(figure, "dense baseline", dense, colour("dense"), colour("paper"), symbol="diamond", numbers=numbers)
    add_joint_numbers(figure, places, labels, below=info.goal == "min")
    if dense:
        _name_dense(figure, min(dense, key=lambda p: p.quality))
    return figure


def thinned(points: Sequence[Point]) -> list[Point]:
    """The points that can be seen apart: of more than ``MOST_BEATEN``, one for each cell of a fine grid."""
    if len(points) <= MOST_BEATEN:
        return list(points)
    columns = _cells([math.log(p.latency_ms) for p in points], _GRID[0])
    rows = _cells([p.quality for p in points], _GRID[1])
    return list(dict(zip(zip(columns, rows, strict=True), points, strict=True)).values())


def _cells(values: Sequence[float], count: int) -> list[int]:
    """The cell of each value, of ``count`` equal ones."""
    low, high = min(values), max(values)
    return [int(count * (value - low) / ((high - low) or 1)) for value in values]


def _told(point: Point) -> str:
    """A point in words, for a page that has no better place to tell it."""
    return f"{escape(point.trial.label, quote=False)}<br>{quality(point.quality)}, {milliseconds(point.latency_ms)}"


def _name_dense(figure: go.Figure, point: Point) -> None:
    figure.add_annotation(
        x=math.log10(point.latency_ms),
        y=point.quality,
        text="dense",
        showarrow=False,
        yanchor="top",
        yshift=-point.diameter / 2,
        font={"color": colour("dense"), "weight": 700},
    )


def _diameters(sizes: Sequence[int | None]) -> list[float]:
    """Marker diameters in pixels whose areas grow evenly with the sizes; the smallest where none was measured."""
    known = [size for size in sizes if size is not None]
    low, high = (min(known), max(known)) if known else (0, 0)
    span = (high - low) or 1
    shares = [0.0 if size is None else (size - low) / span for size in sizes]
    return [math.sqrt(_SMALLEST**2 + share * (_LARGEST**2 - _SMALLEST**2)) for share in shares]


def _shrunk(count: int) -> float:
    """What the diameters of so many points are multiplied by: many points are small points."""
    return max(0.3, min(1.0, math.sqrt(_CROWD / max(1, count))))


def _add_front_line(figure: go.Figure, front: Sequence[Point]) -> None:
    figure.add_trace(
        go.Scatter(
            x=[p.latency_ms for p in front],
            y=[p.quality for p in front],
            mode="lines",
            line={"color": colour("muted"), "width": 1.5, "shape": "hv"},
            hoverinfo="skip",
            name="front line",
        )
    )


def _add_points(
    figure: go.Figure,
    name: str,
    points: Sequence[Point],
    fills: list[str] | str,
    edges: str,
    symbol: str = "circle",
    numbers: Mapping[str, str] | None = None,
) -> None:
    texts = [(numbers or {}).get(p.trial.id, "") for p in points]
    figure.add_trace(
        go.Scatter(
            x=[p.latency_ms for p in points],
            y=[p.quality for p in points],
            customdata=[p.trial.id for p in points],
            hovertext=[_told(p) for p in points],
            text=texts if any(texts) else None,
            mode="markers+text" if any(texts) else "markers",
            textfont={"color": colour("paper"), "size": 11, "weight": 700},
            marker={
                "size": [p.diameter for p in points],
                "color": fills,
                "line": {"color": edges, "width": 1.5},
                "symbol": symbol,
                "opacity": 1,
            },
            hoverinfo="none",
            name=name,
        )
    )
