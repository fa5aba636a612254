"""Learning curves: one figure a series name, one line a trial."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.figures.labels import add_end_labels
from dashboards.frames import Trial
from dashboards.theme import base_figure, colour, density_colour
from raybsa.results.record import SeriesPoint

_HEIGHT, _RIGHT = 340, 64
_TITLES = {"train_loss": "train loss, nats a token"}


class Curve(NamedTuple):
    """One trial's finite points, by step. ``rank`` is its place on the Pareto front, None off it."""

    trial: Trial
    steps: list[int]
    values: list[float]
    rank: int | None


class CurvesInfo(NamedTuple):
    """Curves in drawing order: the dominated below, then the front, the dense baseline on top."""

    name: str
    curves: list[Curve]


def curves_info(series: Sequence[SeriesPoint], trials: Sequence[Trial], ranks: Mapping[str, int]) -> list[CurvesInfo]:
    """The curves of ``trials``, by name; of a trial with several ranks, the lowest rank's.

    Args:
        ranks: trial id -> place on the Pareto front.
    """
    known = {trial.id: trial for trial in trials}
    points: dict[str, dict[str, list[SeriesPoint]]] = defaultdict(lambda: defaultdict(list))
    for point in series:
        if point.trial_id in known and math.isfinite(point.value):
            points[point.name][point.trial_id].append(point)
    return [
        CurvesInfo(
            name, sorted((_curve(known[trial], rows, ranks) for trial, rows in by_trial.items()), key=_drawing_order)
        )
        for name, by_trial in sorted(points.items())
    ]


def curves_plot(info: CurvesInfo) -> go.Figure:
    """Coloured and numbered: the front. Orange: dense. Grey: dominated."""
    figure = base_figure(_HEIGHT, _RIGHT)
    title = _TITLES.get(info.name, info.name.replace("_", " "))
    for curve in info.curves:
        plain = curve.rank is None and not curve.trial.is_dense
        figure.add_trace(
            go.Scatter(
                x=curve.steps,
                y=curve.values,
                mode="lines" if len(curve.steps) > 1 else "markers",
                line={"color": _shade(curve), "width": 1 if plain else 2.2},
                text=escape(curve.trial.label, quote=False),
                hovertemplate="%{text}<br>step %{x}: %{y:.4g}<extra></extra>",
            )
        )
    last = max(curve.steps[-1] for curve in info.curves)
    figure.update_xaxes(title_text="training step", range=[0.4 * last, last] if last else None)
    y_range = later_range(info.curves)
    figure.update_yaxes(title_text=escape(title), range=y_range)
    named = [curve for curve in info.curves if curve.rank is not None or curve.trial.is_dense]
    names = ("dense" if curve.trial.is_dense else str(curve.rank) for curve in named)
    ends = [(curve.values[-1], name, _shade(curve)) for curve, name in zip(named, names, strict=True)]
    add_end_labels(figure, ends, y_range)
    return figure


def later_range(curves: Sequence[Curve]) -> list[float]:
    """The values of the second half of the training, a little widened: there the trials differ."""
    half = max(curve.steps[-1] for curve in curves) / 2
    values = [v for curve in curves for step, v in zip(curve.steps, curve.values, strict=True) if step >= half]
    margin = 0.05 * (max(values) - min(values)) or 0.05
    return [min(values) - margin, max(values) + margin]


def _curve(trial: Trial, points: Sequence[SeriesPoint], ranks: Mapping[str, int]) -> Curve:
    first = min(point.rank for point in points)
    rows = sorted((point.step, point.value) for point in points if point.rank == first)
    return Curve(trial, [step for step, _ in rows], [value for _, value in rows], ranks.get(trial.id))


def _drawing_order(curve: Curve) -> tuple[int, int]:
    return (2 if curve.trial.is_dense else 0 if curve.rank is None else 1, curve.rank or 0)


def _shade(curve: Curve) -> str:
    if curve.trial.is_dense:
        return colour("dense")
    return colour("dominated") if curve.rank is None else density_colour(curve.trial.density)
