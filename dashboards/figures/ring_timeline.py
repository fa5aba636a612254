"""What every rank of a ring did in one step: compute, transfers and waits, hop by hop."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.theme import base_figure, colour
from raybsa.ring.timeline import Span

LANES = {"compute": ("forward", "backward"), "transfer": ("transfer",), "wait": ("wait",)}
_WORDS = {"kv": "K, V", "kv_gradient": "dK, dV"}
_LANE_HEIGHT, _RIGHT = 24, 24


class Bar(NamedTuple):
    """A span as it is drawn: its lane, and milliseconds from the step's begin."""

    rank: int
    lane: str
    text: str
    begin_ms: float
    length_ms: float


class TimelineInfo(NamedTuple):
    """A step's bars by lane and begin, and of all ranks together: milliseconds of compute, transfers and waits."""

    bars: list[Bar]
    ranks: list[int]
    compute_ms: float
    transfer_ms: float
    wait_ms: float

    @property
    def waited(self) -> float | None:
        """The share of the time with transfers under way that ranks only waited for them; None without transfers."""
        return self.wait_ms / self.transfer_ms if self.transfer_ms else None


def timeline_info(spans: Sequence[Span]) -> TimelineInfo | None:
    """One trial's spans; None where there are none. Agreements before the step's first hop are left out."""
    lane_of = {phase: lane for lane, phases in LANES.items() for phase in phases}
    known = [s for s in spans if s.phase in lane_of and (s.kind in _WORDS or lane_of[s.phase] == "compute")]
    if not known:
        return None
    zero = min(span.begin_s for span in known)
    bars = [
        Bar(s.rank, lane_of[s.phase], _text(s), 1e3 * (s.begin_s - zero), 1e3 * (s.end_s - s.begin_s)) for s in known
    ]
    total = {lane: sum(bar.length_ms for bar in bars if bar.lane == lane) for lane in LANES}
    return TimelineInfo(
        sorted(bars, key=lambda bar: (bar.rank, list(LANES).index(bar.lane), bar.begin_ms)),
        sorted({bar.rank for bar in bars}),
        *total.values(),
    )


def timeline_plot(info: TimelineInfo) -> go.Figure:
    """A lane a rank and kind, rank 0 on top; bars of one lane that overlap in time show through each other."""
    lanes = [(rank, lane) for rank in info.ranks for lane in LANES]
    figure = base_figure(96 + _LANE_HEIGHT * len(lanes), _RIGHT)
    places = {lane: index + lane[0] * 0.4 for index, lane in enumerate(lanes)}
    for lane in LANES:
        bars = [bar for bar in info.bars if bar.lane == lane]
        figure.add_trace(
            go.Bar(
                orientation="h",
                base=[bar.begin_ms for bar in bars],
                x=[bar.length_ms for bar in bars],
                y=[places[bar.rank, lane] for bar in bars],
                width=0.82,
                marker={
                    "color": colour(lane),
                    "opacity": 0.55 if lane == "transfer" else 1.0,
                    "line": {"color": colour("card"), "width": 1},
                },
                text=[escape(bar.text) for bar in bars],
                customdata=[[bar.rank, bar.begin_ms] for bar in bars],
                textposition="none",
                hovertemplate="rank %{customdata[0]}: %{text}<br>%{x:.2f} ms from %{customdata[1]:.2f} ms"
                "<extra></extra>",
            )
        )
    figure.update_layout(barmode="overlay", bargap=0.1)
    end = max(bar.begin_ms + bar.length_ms for bar in info.bars)
    figure.update_xaxes(title_text="milliseconds", range=[0, end * 1.01])
    figure.update_yaxes(
        tickvals=list(places.values()),
        ticktext=[f"rank {rank} {lane}" if lane == "compute" else lane for rank, lane in lanes],
        range=[places[lanes[-1]] + 0.6, -0.6],
        showgrid=False,
        ticks="",
    )
    return figure


def _text(span: Span) -> str:
    if span.phase in LANES["compute"]:
        where = "its own blocks" if span.hop == 0 else f"hop {span.hop}"
        return f"{span.phase}, {where}"
    verb = "waits for" if span.phase == "wait" else "transfer of"
    return f"{verb} {_WORDS[span.kind]}, hop {span.hop}"
