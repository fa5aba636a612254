"""What compressed gradients cost: the training's loss against the bytes that a rank has sent."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.frames import Trial
from dashboards.theme import base_figure, colour, log_axis, spread
from raybsa.experiments.compared import codec_label
from raybsa.results.record import SeriesPoint

_HEIGHT, _RIGHT = 420, 230
_SMOOTHED = 10  # points of the curve that one mean takes


class LossLine(NamedTuple):
    """A codec's mean over seeds: MiB that a rank has sent, and the loss (nats a token) at that time. ``kind`` is
    ``"dense"`` (uncompressed), ``"own"`` or ``"rival"``."""

    codec: str
    kind: str
    mib: list[float]
    loss: list[float]


def loss_lines(trials: Sequence[Trial], series: Sequence[SeriesPoint]) -> list[LossLine]:
    """A line for each codec, the most bytes first. Steps send alike, so bytes grow evenly with them."""
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for point in series:
        if point.name == "train_loss":
            curves[point.trial_id][point.step] = point.value
    by_codec: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if curves[trial.id]:
            by_codec[codec_label(json.loads(trial.record.spec)["task_params"].get("codec", "none"))].append(trial)
    lines = [_line(codec, group, [curves[trial.id] for trial in group]) for codec, group in by_codec.items()]
    return sorted(lines, key=lambda line: -line.mib[-1])


def loss_plot(lines: Sequence[LossLine]) -> go.Figure:
    """Bytes on a log axis; below and to the left is better. Orange: uncompressed."""
    figure = base_figure(_HEIGHT, _RIGHT)
    for line in lines:
        figure.add_trace(
            go.Scatter(
                x=line.mib,
                y=line.loss,
                mode="lines",
                line={"color": colour(line.kind), "width": 2, "dash": "dot" if line.kind == "rival" else "solid"},
                text=[escape(line.codec, quote=False)] * len(line.mib),
                hovertemplate="%{text}<br>%{x:.4~g} MiB: %{y:.3f} nats<extra></extra>",
            )
        )
    figure.update_xaxes(log_axis([x for line in lines for x in line.mib], "MiB of gradients that a rank has sent"))
    low, high = min(y for line in lines for y in line.loss), max(y for line in lines for y in line.loss)
    top = high + 0.05 * (high - low)
    figure.update_yaxes(title_text="loss, nats a token", range=[low - 0.05 * (high - low), top])
    places = spread([line.loss[-1] for line in lines], (top - low) * 16 / (_HEIGHT - 72), top)
    for line, place in zip(lines, places, strict=True):
        figure.add_annotation(
            x=1,
            xref="paper",
            y=place,
            text=escape(line.codec, quote=False),
            xanchor="left",
            xshift=8,
            showarrow=False,
            font={"color": colour(line.kind), "size": 12},
        )
    return figure


def _line(codec: str, trials: Sequence[Trial], curves: Sequence[dict[int, float]]) -> LossLine:
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    loss = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
    smooth = [sum(part := loss[max(0, i - _SMOOTHED + 1) : i + 1]) / len(part) for i in range(len(loss))]
    sent = sum(trial.record.wire_bytes for trial in trials) / len(trials) / 2**20
    kind = "dense" if codec == "none" else "rival" if codec.startswith("torch") else "own"
    return LossLine(codec, kind, [sent * (i + 1) / len(steps) for i in range(len(steps))], smooth)
