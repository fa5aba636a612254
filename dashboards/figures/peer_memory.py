"""Memory that forward and backward need beyond inputs, output and gradients, over the length of the sequence."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from math import log10
from typing import NamedTuple

import plotly.graph_objects as go

from dashboards.figures.labels import add_end_labels
from dashboards.figures.peers import NAMES, SYMBOLS
from dashboards.theme import base_figure, colour, log_axis
from dashboards.wording import size, tokens
from raybsa.experiments.peer_rows import Row, extra_bytes, held_bytes
from raybsa.kernels.auto_table import OWN, PEERS

MIB, GIB = 1 << 20, 1 << 30
CLAIMED = {8192: 40 * MIB, 16384: 160 * MIB, 32768: 640 * MIB, 65536: 2.5 * GIB, 131072: 10 * GIB}
_HEIGHT, _RIGHT = 360, 120


class MemoryPoint(NamedTuple):
    """Bytes at a length, and what the reader is told on hover."""

    tokens: int
    size: float
    told: str


class MemoryInfo(NamedTuple):
    """Points by backend (and ``dense``), the shortest first."""

    lines: dict[str, list[MemoryPoint]]


def memory_info(rows: Sequence[Row]) -> MemoryInfo | None:
    """The sparsest cell of each length; None where ours was measured at fewer than two lengths.

    What stays with the layout between calls counts too. A line leaves out what it did not need at all.
    """
    sparsest: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: row.density or 1.0):
        if row.own is not None and row.density:
            sparsest.setdefault(row.spec.seq_len, row)
    lines: dict[str, list[MemoryPoint]] = defaultdict(list)
    for length, row in sorted(sparsest.items()):
        held, own = held_bytes(row.spec), row.own
        assert own is not None
        records = {OWN: own, **row.peers}
        for backend in (OWN, *PEERS):
            extra = extra_bytes(records[backend], row.spec) if backend in records else None
            if extra is not None:
                kept = records[backend].layout_bytes or 0
                told = f"{NAMES[backend]}: {size(max(extra, 0))}, and {size(kept)} with the layout"
                _append(lines[backend], length, extra + kept, f"{escape(row.name)}<br>{told}", held)
        if own.dense_peak_bytes is not None:
            extra = own.dense_peak_bytes - held
            _append(lines["dense"], length, extra, f"dense cuDNN: {size(max(extra, 0))}", held)
    return MemoryInfo(dict(lines)) if len(lines.get(OWN, ())) > 1 else None


def memory_plot(info: MemoryInfo) -> go.Figure:
    """Log-log; dashed: what the project before this one claimed."""
    figure = base_figure(_HEIGHT, _RIGHT)
    claimed = [MemoryPoint(n, held, f"claimed: {size(held)}") for n, held in CLAIMED.items()]
    line = {"color": colour("claim"), "width": 2, "dash": "dash"}
    _add(figure, claimed, {"mode": "lines+markers", "line": line, "marker": {"color": colour("claim"), "symbol": "x"}})
    ends = [(log10(claimed[-1].size / MIB), "origin's claim", colour("claim"))]
    for backend, points in reversed([item for item in info.lines.items() if item[1]]):
        marker = {"color": colour(backend), "size": 8, "symbol": SYMBOLS.get(backend, "diamond")}
        line = {"color": colour(backend), "width": 2.5 if backend == OWN else 1.5}
        _add(figure, points, {"mode": "lines+markers", "line": line, "marker": marker})
        ends.append((log10(points[-1].size / MIB), NAMES.get(backend, "dense cuDNN"), colour(backend)))
    every = [point for points in (claimed, *info.lines.values()) for point in points]
    lengths = sorted({point.tokens for point in every})
    figure.update_xaxes(log_axis(lengths, "tokens (log scale)"))
    figure.update_xaxes(tickvals=lengths, ticktext=[tokens(n) for n in lengths])
    axis = log_axis([point.size / MIB for point in every], "MiB (log scale)")
    figure.update_yaxes(axis)
    add_end_labels(figure, ends, axis["range"])
    return figure


def _append(line: list[MemoryPoint], length: int, found: int, told: str, held: int) -> None:
    if found > 0:
        line.append(MemoryPoint(length, found, f"{told}<br>{found / held:.1%} of q + k + v + out"))


def _add(figure: go.Figure, points: Sequence[MemoryPoint], style: dict) -> None:
    figure.add_trace(
        go.Scatter(
            x=[point.tokens for point in points],
            y=[point.size / MIB for point in points],
            text=[point.told for point in points],
            hovertemplate="%{text}<br>%{x:,} tokens<extra></extra>",
            **style,
        )
    )
