"""What compressed gradients cost: the training's loss against the bytes that a rank has sent."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.figures.labels import add_end_labels
from dashboards.frames import Trial
from dashboards.theme import PALETTE, base_figure, colour, log_axis
from raybsa.experiments.compared import codec_label
from raybsa.results.record import SeriesPoint

_HEIGHT, _RIGHT = 420, 262
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKS = dict(zip(_DASHES, ("──", "– –", "····", "–·–", "— —", "—·—"), strict=True))  # beside the names
_KINDS = {"none": "dense", "powersgd": "own", "torch_powersgd": "rival", "fp16": "cast", "bf16": "cast"}
_SMOOTHED = 10  # points of the curve that one mean takes


class LossLine(NamedTuple):
    """A codec's mean over seeds: MiB that a rank has sent, and the loss (nats a token) at that time. ``kind`` is the
    colour of its family, ``dash`` tells codecs of one family apart."""

    codec: str
    kind: str
    dash: str
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
    kinds: dict[str, list[str]] = defaultdict(list)
    for codec in sorted(by_codec):
        kinds[_kind(codec)].append(codec)
    dashes = {codec: _DASHES[i % len(_DASHES)] for codecs in kinds.values() for i, codec in enumerate(codecs)}
    lines = [
        _line(codec, dashes[codec], group, [curves[trial.id] for trial in group]) for codec, group in by_codec.items()
    ]
    return sorted(lines, key=lambda line: -line.mib[-1])


def loss_plot(lines: Sequence[LossLine]) -> go.Figure:
    """Bytes on a log axis; below and to the left is better. A colour a family of codecs, a dash a codec."""
    figure = base_figure(_HEIGHT, _RIGHT)
    for line in lines:
        figure.add_trace(
            go.Scatter(
                x=line.mib,
                y=line.loss,
                mode="lines",
                line={"color": colour(line.kind), "width": 2, "dash": line.dash},
                text=escape(line.codec, quote=False),
                hovertemplate="%{text}<br>%{x:.4~g} MiB: %{y:.3f} nats<extra></extra>",
            )
        )
    figure.update_xaxes(log_axis([x for line in lines for x in line.mib], "MiB of gradients that a rank has sent"))
    low, high = min(y for line in lines for y in line.loss), max(y for line in lines for y in line.loss)
    top = high + 0.05 * (high - low)
    figure.update_yaxes(title_text="loss, nats a token", range=[low - 0.05 * (high - low), top])
    ends = [(line.loss[-1], f"{_MARKS[line.dash]} {line.codec}", colour(line.kind)) for line in lines]
    add_end_labels(figure, ends, [low - 0.05 * (high - low), top])
    return figure


def _kind(codec: str) -> str:
    """The colour of a codec's family."""
    family = codec.split()[0]
    kind = _KINDS.get(family, family)
    return kind if kind in PALETTE else "muted"


def _line(codec: str, dash: str, trials: Sequence[Trial], curves: Sequence[dict[int, float]]) -> LossLine:
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    loss = [sum(curve[step] for curve in curves) / len(curves) for step in steps]
    smooth = [sum(part := loss[max(0, i - _SMOOTHED + 1) : i + 1]) / len(part) for i in range(len(loss))]
    sent = sum(trial.record.wire_bytes for trial in trials) / len(trials) / 2**20
    return LossLine(codec, _kind(codec), dash, [sent * (i + 1) / len(steps) for i in range(len(steps))], smooth)
