"""Colours and axes shared by every figure: one colour, one meaning, on the whole page.

Figures are drawn with the light colours below; the page swaps each for its dark twin where the reader prefers dark.
The ramp rises in contrast from cyan to violet and the baseline is vermilion (Okabe and Ito, "Color Universal Design",
2008), so that no two meanings rest on telling red from green.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import plotly.graph_objects as go

# meaning -> (light, dark); every light colour is used for one meaning only
PALETTE = {
    "paper": ("#ffffff", "#15181d"),
    "card": ("#f6f7f9", "#1d2128"),
    "ink": ("#1b1f24", "#e8eaee"),
    "muted": ("#59616c", "#a3abb8"),
    "grid": ("#dfe3e8", "#343a44"),
    "dense": ("#d55e00", "#ff9147"),
    "dominated": ("#9aa2ad", "#6d7684"),
    "compute": ("#00785a", "#3cd59c"),
    "transfer": ("#b0568f", "#e078ad"),
    "wait": ("#a87900", "#dab74c"),
    "triton": ("#aa3377", "#ec86bd"),
    "flex": ("#228833", "#62c972"),
    "fa4": ("#3f6fb5", "#82b1ec"),
    "cudnn": ("#947100", "#d8b741"),
    "claim": ("#7a4a2b", "#c99a78"),
    "detect": ("#913244", "#ff8f85"),
    "fill": ("#7d6b00", "#d9c850"),
    "rebuild": ("#0a7282", "#9acbd1"),
    "resume": ("#4a5fc1", "#a3b1ff"),
    "own": ("#1d6b8f", "#6cc4ea"),
    "rival": ("#7347ba", "#e26eb9"),
    "topk": ("#446219", "#d7e383"),
    "int8": ("#60847e", "#4bd59b"),
    "cast": ("#5b464d", "#df6f6b"),
    "picture0": ("#e4e8ed", "#2c333d"),
    "picture1": ("#bac0c9", "#535c6a"),
    "picture2": ("#8d95a1", "#838d9b"),
    "picture3": ("#5c6470", "#b6bdc9"),
    "picture4": ("#20242a", "#f2f4f7"),
    "density0": ("#3ba3cf", "#7a5cd6"),
    "density1": ("#2b82c9", "#6f83ee"),
    "density2": ("#2f5fb8", "#5ba6f2"),
    "density3": ("#3d3fa3", "#63c6f0"),
    "density4": ("#451f86", "#93e0ee"),
    "density5": ("#2a0a4d", "#d6f6f8"),
}
DENSITY_EDGES = (0.015, 0.04, 0.08, 0.15, 0.3)
DENSITY_LABELS = ("≤ 1.5 %", "≤ 4 %", "≤ 8 %", "≤ 15 %", "≤ 30 %", "> 30 %")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_TICK_STEPS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    tuple(1 + i / 2 for i in range(18)),
    tuple(1 + i / 5 for i in range(45)),
)


def colour(meaning: str) -> str:
    """The light colour of a meaning; the page knows its dark twin."""
    return PALETTE[meaning][0]


AXIS = {
    "gridcolor": colour("grid"),
    "linecolor": colour("muted"),
    "tickcolor": colour("muted"),
    "ticks": "outside",
    "automargin": True,
    "zeroline": False,
    "title": {"standoff": 8},
}


def density_class(density: float | None) -> int:
    """Which of ``DENSITY_LABELS`` a density belongs to; what has no density of its own counts as the densest."""
    return len(DENSITY_EDGES) if density is None else bisect_left(DENSITY_EDGES, density)


def density_colour(density: float | None) -> str:
    """The colour of a density: the same in every figure and every report."""
    return colour(f"density{density_class(density)}")


def dark_twins() -> dict[str, str]:
    """Light colour -> dark colour."""
    return dict(PALETTE.values())


def css_variables(dark: bool) -> str:
    """The palette as CSS custom properties."""
    return "".join(f"--{meaning}:{pair[dark]};" for meaning, pair in PALETTE.items())


def base_figure(height: int, right: int = 24) -> go.Figure:
    """An empty figure in the page's type and colours, with room for labels of ``right`` pixels beside the plot."""
    text = {"family": FONT, "size": 13, "color": colour("ink")}
    hover = {"bgcolor": colour("paper"), "bordercolor": colour("muted"), "font": text, "align": "left"}
    return go.Figure(
        layout={  # in one piece: each update of a figure checks all of it again
            "template": "none",
            "height": height,
            "autosize": True,
            "showlegend": False,
            "margin": {"l": 72, "r": right, "t": 16, "b": 56},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": text,
            "hoverlabel": hover,
            "xaxis": AXIS,
            "yaxis": AXIS,
        }
    )


def log_axis(values: Sequence[float], title: str, *, limit: int = 7, pad: float = 0.08) -> dict:
    """A log axis over positive ``values`` whose ticks are whole readable numbers, at most ``limit`` of them."""
    low, high = min(values), max(values)
    margin = max(pad * math.log10(high / low), 0.06)
    low, high = low / 10**margin, high * 10**margin
    ticks = log_ticks(low, high, limit)
    return {
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": ticks,
        "ticktext": [f"{tick:,.6g}" for tick in ticks],
        "title": {"text": title},
    }


def log_ticks(low: float, high: float, limit: int = 7) -> list[float]:
    """Round numbers in low..high: the finest of the usual series (decades, 1-3, 1-2-5, …) that gives at most ``limit``.

    A range in which that gives fewer than two is divided evenly instead.
    """
    best: list[float] = []
    for steps in _TICK_STEPS:
        ticks = _ticks(low, high, steps)
        if len(ticks) <= limit:
            best = ticks
    return best if len(best) >= 2 else _even_ticks(low, high)


def spread(positions: Sequence[float], gap: float, high: float = math.inf) -> list[float]:
    """The positions of labels, in the given order, moved up until ``gap`` apart, then down until below ``high``."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = list(positions)
    floor, ceiling = -math.inf, high
    for index in order:
        placed[index] = max(placed[index], floor)
        floor = placed[index] + gap
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def _ticks(low: float, high: float, steps: Sequence[float]) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = (float(f"{step * 10.0**decade:.6g}") for decade in decades for step in steps)
    return [value for value in values if low <= value <= high]


def _even_ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(high - low))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{index * step:.6g}") for index in range(first, last + 1)]
