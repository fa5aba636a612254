"""Time of one pass over density: our kernels, other libraries' and the ideal, on layouts of one kind and size."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.figures.labels import add_end_labels
from dashboards.theme import base_figure, colour, log_axis
from dashboards.wording import milliseconds, percent
from raybsa.experiments.peer_rows import Row, pass_of
from raybsa.kernels.auto_table import OWN, PEERS

NAMES = {OWN: "ours", "flex": "FlexAttention", "fa4": "FA4", "cudnn": "cuDNN"}
SYMBOLS = {OWN: "circle", "flex": "square", "fa4": "triangle-up", "cudnn": "cross"}
_HEIGHT, _RIGHT = 340, 104


class PeerPoint(NamedTuple):
    """One cell: its kept share, milliseconds, and what the reader is told on hover."""

    density: float
    ms: float
    told: str


class PeerLine(NamedTuple):
    """A backend's cells, the sparsest first."""

    backend: str
    points: list[PeerPoint]


class PeersInfo(NamedTuple):
    """The backends that were measured, and dense cuDNN × density."""

    lines: list[PeerLine]
    ideal: list[PeerPoint]


def peers_info(rows: Sequence[Row], name: str) -> PeersInfo | None:
    """The lines of a pass (``forward`` or ``forward_backward``) over cells that differ in density; None without any."""
    found: dict[str, list[PeerPoint]] = {backend: [] for backend in (OWN, *PEERS)}
    ideal: list[PeerPoint] = []
    for row in sorted(rows, key=lambda row: row.density or 0.0):
        times = pass_of(row, name)
        if times.own is None or not row.density:
            continue
        if times.ideal:
            ideal.append(PeerPoint(row.density, times.ideal, f"ideal: {milliseconds(times.ideal)}"))
        for backend, ms in {OWN: times.own, **times.peers}.items():
            told = f"{NAMES[backend]}: {milliseconds(ms)}"
            told += f", {percent(times.ideal / ms)} of ideal" if times.ideal else ""
            told += "" if backend == OWN else f"<br>ours takes {times.own / ms:.2f} of its time"
            told += "<br>auto takes it" if backend == times.auto_name else ""
            found[backend].append(PeerPoint(row.density, ms, f"{escape(row.name)}<br>{told}"))
    lines = [PeerLine(backend, points) for backend, points in found.items() if points]
    return PeersInfo(lines, ideal) if lines else None


def peers_plot(info: PeersInfo) -> go.Figure:
    """Log-log; dotted: the ideal. Ours lies on top."""
    figure = base_figure(_HEIGHT, _RIGHT)
    if info.ideal:
        _add(figure, info.ideal, {"mode": "lines", "line": {"color": colour("muted"), "width": 1.5, "dash": "dot"}})
    for line in reversed(info.lines):
        shade = colour(line.backend)
        marker = {"color": shade, "size": 8, "symbol": SYMBOLS[line.backend]}
        width = 2.5 if line.backend == OWN else 1.5
        _add(figure, line.points, {"mode": "lines+markers", "line": {"color": shade, "width": width}, "marker": marker})
    every = [point for points in (info.ideal, *(line.points for line in info.lines)) for point in points]
    figure.update_xaxes(log_axis([100 * point.density for point in every], "blocks kept, % (log scale)"))
    axis = log_axis([point.ms for point in every], "ms (log scale)")
    figure.update_yaxes(axis)
    ends = [(log10(line.points[-1].ms), NAMES[line.backend], colour(line.backend)) for line in info.lines]
    if info.ideal:
        ends.append((log10(info.ideal[-1].ms), "ideal", colour("muted")))
    add_end_labels(figure, ends, axis["range"])
    return figure


def _add(figure: go.Figure, points: Sequence[PeerPoint], style: dict) -> None:
    figure.add_trace(
        go.Scatter(
            x=[100 * point.density for point in points],
            y=[point.ms for point in points],
            text=[point.told for point in points],
            hovertemplate="%{text}<br>%{x:.3~g} % kept<extra></extra>",
            **style,
        )
    )
