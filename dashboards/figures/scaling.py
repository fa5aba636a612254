"""Time and memory against sequence length, beside dense attention and the ideal: dense × density."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import log10
from statistics import median
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.figures.labels import add_end_labels
from dashboards.figures.marks import Mark, marks
from dashboards.frames import Trial, line_label
from dashboards.theme import base_figure, colour, density_colour, log_axis
from dashboards.wording import percent, tokens
from raybsa.results.record import Record

Reader = Callable[[Record], float | None]
_HEIGHT, _RIGHT = 340, 64


class Quantity(NamedTuple):
    """Something drawn against length: its own value, its spread and the dense baseline's, in one unit."""

    title: str
    unit: str
    own: Reader
    low: Reader
    high: Reader
    dense: Reader
    has_ideal: bool


class Line(NamedTuple):
    """One asked density: equally long lists over ascending lengths.

    ``density`` is the one asked for, else that of the longest; ``ideal`` is dense × the measured density where known.
    """

    name: str
    density: float | None
    lengths: list[int]
    values: list[float]
    below: list[float]
    above: list[float]
    ideal: list[float | None]


class ScalingInfo(NamedTuple):
    """One pattern's lines, sparsest first, and the dense baseline as (length, value) pairs."""

    quantity: Quantity
    lines: list[Line]
    dense: list[tuple[int, float]]


def _mib(value: float | None) -> float | None:
    return None if value is None else value / (1 << 20)


FORWARD = Quantity(
    "Forward",
    "ms",
    lambda r: r.forward_ms_p50,
    lambda r: r.forward_ms_p20,
    lambda r: r.forward_ms_p80,
    lambda r: r.dense_forward_ms_p50,
    True,
)
FORWARD_BACKWARD = Quantity(
    "Forward + backward",
    "ms",
    lambda r: r.forward_backward_ms_p50,
    lambda r: r.forward_backward_ms_p20,
    lambda r: r.forward_backward_ms_p80,
    lambda r: r.dense_forward_backward_ms_p50,
    True,
)
MEMORY = Quantity(
    "Peak memory",
    "MiB",
    lambda r: _mib(r.peak_bytes),
    lambda r: _mib(r.peak_bytes),
    lambda r: _mib(r.peak_bytes),
    lambda r: _mib(r.dense_peak_bytes),
    False,
)
QUANTITIES = (FORWARD, FORWARD_BACKWARD, MEMORY)


def split_by_pattern(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """The sparse trials of one speed comparison by pattern, variant and backend: one row of figures each."""
    groups: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if not trial.is_dense:
            groups[f"{line_label(trial)} · {trial.record.variant} · {trial.record.backend}"].append(trial)
    return dict(sorted(groups.items()))


def scaling_info(trials: Sequence[Trial], everything: Sequence[Trial], quantity: Quantity) -> ScalingInfo | None:
    """One pattern's ``trials`` beside the dense baseline of ``everything``; None where nothing was measured.

    A zero (memory below the resolution of its measurement) has no place on a log axis and is left out. The newest
    trial speaks for its density and length; the baseline of a length is the median of its measurements.
    """
    baseline: dict[int, list[float]] = defaultdict(list)
    for trial in everything:
        value = quantity.own(trial.record) if trial.is_dense else quantity.dense(trial.record)
        if value:
            baseline[trial.record.seq_len].append(value)
    dense = {length: median(values) for length, values in sorted(baseline.items())}
    newest: dict[tuple[float | None, int], Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.record.created_at):
        if quantity.own(trial.record):
            newest[trial.asked_density, trial.record.seq_len] = trial
    densities = sorted({density for density, _ in newest}, key=lambda d: (d is None, d))
    lines = [_line(density, newest, dense, quantity) for density in densities]
    return ScalingInfo(quantity, lines, list(dense.items())) if lines else None


def _line(
    density: float | None, newest: dict[tuple[float | None, int], Trial], dense: dict[int, float], quantity: Quantity
) -> Line:
    lengths = sorted(length for own, length in newest if own == density)
    records = [newest[density, length].record for length in lengths]
    values = [quantity.own(record) or 0.0 for record in records]
    low = [quantity.low(record) for record in records]
    high = [quantity.high(record) for record in records]
    return Line(
        "own" if density is None else percent(density),
        newest[density, lengths[-1]].density,
        lengths,
        values,
        [0.0 if bound is None else value - bound for value, bound in zip(values, low, strict=True)],
        [0.0 if bound is None else bound - value for value, bound in zip(values, high, strict=True)],
        [_ideal(record, dense) if quantity.has_ideal else None for record in records],
    )


def _ideal(record: Record, dense: dict[int, float]) -> float | None:
    baseline = dense.get(record.seq_len)
    return None if baseline is None or record.density is None else baseline * record.density


def scaling_plot(info: ScalingInfo) -> go.Figure:
    """Log-log. Solid: measured, with p20 to p80; dotted in the same colour: the ideal; diamonds: dense.

    Lines of one colour differ in their points, which stand before their names.
    """
    unit = info.quantity.unit
    figure = base_figure(_HEIGHT, _RIGHT)
    shades = [density_colour(line.density) for line in info.lines]
    lines = list(zip(info.lines, shades, marks(shades), strict=True))
    for line, _, mark in lines:
        _add_line(figure, line, mark, unit)
    if info.dense:
        _add_dense(figure, info.dense, unit)
    lengths = sorted({n for line in info.lines for n in line.lengths} | {n for n, _ in info.dense})
    figure.update_xaxes(log_axis(lengths, "tokens (log scale)"))
    ticks = lengths[:: -(-len(lengths) // 7)]
    figure.update_xaxes(tickvals=ticks, ticktext=[tokens(n) for n in ticks])
    values = [v for line in info.lines for v in (*line.values, *line.ideal) if v is not None]
    axis = log_axis([*values, *(v for _, v in info.dense)], f"{unit} (log scale)")
    figure.update_yaxes(axis)
    ends = [(log10(line.values[-1]), mark.beside(line.name), shade) for line, shade, mark in lines]
    if info.dense:
        ends.append((log10(info.dense[-1][1]), "dense", colour("dense")))
    add_end_labels(figure, ends, axis["range"])
    return figure


def _add_line(figure: go.Figure, line: Line, mark: Mark, unit: str) -> None:
    shade, name = density_colour(line.density), line.name
    ideal = [(n, v) for n, v in zip(line.lengths, line.ideal, strict=True) if v is not None]
    if ideal:
        x, y = zip(*ideal, strict=True)
        figure.add_trace(
            go.Scatter(
                x=x,
                y=y,
                mode="lines",
                line={"color": shade, "width": 1.5, "dash": "dot"},
                hovertemplate=f"ideal, density {name}<br>%{{x:,}} tokens: %{{y:.3g}} {unit}<extra></extra>",
            )
        )
    bars = {"type": "data", "symmetric": False, "array": line.above, "arrayminus": line.below, "width": 3}
    figure.add_trace(
        go.Scatter(
            x=line.lengths,
            y=line.values,
            mode="lines+markers",
            line={"color": shade, "width": 2},
            marker={"color": shade, "size": 7, "symbol": mark.symbol},
            error_y={**bars, "color": shade, "thickness": 1},
            hovertemplate=f"density {name}<br>%{{x:,}} tokens: %{{y:.3g}} {unit}<extra></extra>",
        )
    )


def _add_dense(figure: go.Figure, dense: Sequence[tuple[int, float]], unit: str) -> None:
    x, y = zip(*dense, strict=True)
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            mode="lines+markers",
            line={"color": colour("dense"), "width": 2},
            marker={"color": colour("dense"), "size": 8, "symbol": "diamond"},
            hovertemplate=f"dense<br>%{{x:,}} tokens: %{{y:.3g}} {unit}<extra></extra>",
        )
    )
