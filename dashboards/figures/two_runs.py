"""Two runs side by side: their fronts in one figure, and the change of each question that both answered."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log2
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.figures.labels import shortened
from dashboards.figures.pareto import ParetoInfo, Point
from dashboards.frames import Trial
from dashboards.theme import base_figure, colour, log_axis
from dashboards.wording import milliseconds, quality, ratio, times

NAMES = ("A", "B")
MEANINGS = ("own", "rival")  # in the palette
SYMBOLS = ("circle", "square")
_MOST = 40  # bars of a figure
_LETTERS = 36  # of a bar's name beside it


class Pair(NamedTuple):
    """One question that both runs answered."""

    a: Trial
    b: Trial

    @property
    def label(self) -> str:
        lengths = f", {self.a.record.seq_len:,} tokens"
        return f"{self.a.label}{lengths}{'' if self.a.record.seed == 0 else f', seed {self.a.record.seed}'}"

    @property
    def slower(self) -> float | None:
        """B's time of forward and backward (of forward, where one has no more) over A's."""
        both = ratio(self.b.record.forward_backward_ms_p50, self.a.record.forward_backward_ms_p50)
        return both or ratio(self.b.record.forward_ms_p50, self.a.record.forward_ms_p50)


def pairs(a: Sequence[Trial], b: Sequence[Trial]) -> list[Pair]:
    """Trials of equal specs, seed included, that finished in both; the newest of each run speaks for it."""
    first = {trial.record.spec_hash: trial for trial in a if trial.record.status == "ok"}
    second = {trial.record.spec_hash: trial for trial in b if trial.record.status == "ok"}
    found = [Pair(first[name], second[name]) for name in first if name in second]
    return sorted(found, key=lambda pair: pair.label)


def changes_plot(found: Sequence[Pair]) -> go.Figure | None:
    """A bar a question in the colour of the faster run, to the right where B takes longer; log axis.

    None where no time was measured in both."""
    timed = sorted((slower, pair.label) for pair in found if (slower := pair.slower) is not None)
    if not timed:
        return None
    shown = timed if len(timed) <= _MOST else timed[: _MOST // 2] + timed[-_MOST // 2 :]
    labels = [escape(label, quote=False) for _, label in shown]
    names = [escape(shortened(label, _LETTERS), quote=False) for _, label in shown]
    figure = base_figure(96 + 24 * len(shown))
    figure.add_trace(
        go.Bar(
            orientation="h",
            y=list(range(len(shown))),
            x=[log2(slower) for slower, _ in shown],
            marker={"color": [colour(MEANINGS[slower < 1]) for slower, _ in shown]},
            text=[times(slower) for slower, _ in shown],
            textposition="outside",
            cliponaxis=False,
            customdata=labels,
            hovertemplate="%{customdata}<br>B takes %{text} the time of A<extra></extra>",
        )
    )
    reach = max(0.3, *(abs(log2(slower)) for slower, _ in shown)) * 1.25
    ticks = [n for n in (0.1, 0.2, 0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0, 5.0, 10.0) if abs(log2(n)) <= reach]
    figure.update_xaxes(
        title_text="time of B / A (log scale)", range=[-reach, reach], tickvals=list(map(log2, ticks)),
        ticktext=[f"{n:g}×" for n in ticks],
    )  # fmt: skip
    figure.update_yaxes(showgrid=False, ticks="", tickvals=list(range(len(shown))), ticktext=names)
    figure.add_vline(x=0, line={"color": colour("muted"), "width": 1.5})
    return figure


def fronts_plot(infos: Sequence[ParetoInfo]) -> go.Figure:
    """The fronts of A and B over one pair of axes; what is off them is left out."""
    figure = base_figure(460)
    for info, name, meaning, symbol in zip(infos, NAMES, MEANINGS, SYMBOLS, strict=True):
        _add_front(figure, info, name, colour(meaning), symbol)
    values = [point.latency_ms for info in infos for point in info.front]
    figure.update_xaxes(
        log_axis(values, f"attention {infos[0].latency_label}, median (ms, log scale; lower is better)")
    )
    better = "lower" if infos[0].goal == "min" else "higher"
    figure.update_yaxes(title_text=f"{escape(infos[0].quality_label)} ({better} is better)")
    return figure


def _add_front(figure: go.Figure, info: ParetoInfo, name: str, shade: str, symbol: str) -> None:
    def text(point: Point) -> str:
        label = escape(point.trial.label, quote=False)
        return f"{name}: {label}<br>{quality(point.quality)}, {milliseconds(point.latency_ms)}"

    figure.add_trace(
        go.Scatter(
            x=[point.latency_ms for point in info.front],
            y=[point.quality for point in info.front],
            mode="lines+markers",
            line={"color": shade, "width": 1.5, "shape": "hv"},
            marker={"color": shade, "size": 10, "symbol": symbol},
            text=[text(point) for point in info.front],
            hovertemplate="%{text}<extra></extra>",
        )
    )
