"""What a pattern looks like: the blocks it keeps, at a capped number of cells."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dashboards.theme import AXIS, base_figure, colour
from dashboards.wording import EARLIER_DENSITY, cut
from raybsa import patterns
from raybsa.layout import BlockLayout
from raybsa.spec import ADAPTIVE, AttentionSpec, PatternSpec, TrialSpec

MAX_CELLS = 32
MAX_BLOCKS = 512  # a side of what is drawn
MAX_PANELS = 4
ABOVE = "."
_SHARES = {
    ABOVE: "above the diagonal",
    "0": "no block kept",
    "1": "up to ¼ of the blocks kept",
    "2": "up to ½ of the blocks kept",
    "3": "up to ¾ of the blocks kept",
    "4": "more than ¾ of the blocks kept",
}


class Panel(NamedTuple):
    """One square picture: a string a row, ``"0"`` (nothing kept) to ``"4"`` (all kept), ``"."`` above the diagonal."""

    caption: str
    rows: tuple[str, ...]


class Drawing(NamedTuple):
    """A trial's pattern drawn at ``tokens`` tokens: its panels, or the reason why there is none."""

    tokens: int
    panels: tuple[Panel, ...]
    problem: str | None = None


def drawing_info(spec: TrialSpec, own_patterns: bool = False, most: int = MAX_PANELS) -> Drawing:
    """One panel for each distinct head; where layers differ, one for each distinct layer. Up to ``most``.

    It is drawn at the timed length, at most ``MAX_BLOCKS`` blocks. ``own_patterns`` lets it import a ``module:Class``
    that the spec names: a results folder from elsewhere must not choose what code runs here.
    """
    tokens = min(spec.seq_len, MAX_BLOCKS * min(layer.block_size for layer in spec.attention))
    layers = list(dict.fromkeys(spec.attention))[:most]
    foreign = [name for layer in layers if layer.pattern for name in _family_names(layer.pattern) if ":" in name]
    if foreign and not own_patterns:
        return Drawing(tokens, (), f"not drawn: {cut(str(foreign[0]))} is not raybsa's own; --own-patterns imports it")
    if not spec.is_current:
        return Drawing(tokens, (), f"not drawn: {EARLIER_DENSITY}")
    drawn = [_draw(layer, tokens, spec.num_heads, spec.causal, most) for layer in layers]
    problems = [problem for problem in drawn if isinstance(problem, str)]
    panels = [panels for panels in drawn if not isinstance(panels, str)]
    if problems:
        return Drawing(tokens, (), problems[0])
    if len(layers) == 1:
        return Drawing(tokens, panels[0])
    named = (
        Panel(f"{_which(layer, spec)}, {own[0].caption}", own[0].rows)
        for layer, own in zip(layers, panels, strict=True)
    )
    return Drawing(tokens, tuple(named))


def _which(attention: AttentionSpec, spec: TrialSpec) -> str:
    """``layer 1``, or ``layers 0, 2``: those that attend so."""
    numbers = [str(number) for number, layer in enumerate(spec.attention) if layer == attention]
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def picture_plot(drawing: Drawing) -> go.Figure:
    """Heat maps over token positions: queries downward, keys to the right; darker keeps more."""
    columns = min(len(drawing.panels), 2)
    rows = -(-len(drawing.panels) // 2)
    titles = [panel.caption for panel in drawing.panels] if len(drawing.panels) > 1 else None
    grid = make_subplots(rows, columns, subplot_titles=titles, horizontal_spacing=0.12, vertical_spacing=0.16)
    figure = base_figure(300)
    grid.update_layout(figure.layout, margin={"l": 52, "r": 28, "t": 8, "b": 44})
    grid.update_annotations(font_size=12)
    grid.update_xaxes(AXIS)
    grid.update_yaxes(AXIS)
    for index, panel in enumerate(drawing.panels):
        _add_panel(grid, panel, drawing.tokens, index // 2 + 1, index % 2 + 1)
    if len(drawing.panels) > 1:
        grid.update_layout(margin={"l": 8, "r": 8, "t": 24, "b": 8})
        grid.update_traces(xgap=0, ygap=0)
        grid.update_xaxes(showticklabels=False, ticks="", title_text="")
        grid.update_yaxes(showticklabels=False, ticks="", title_text="")
    return grid


def _family_names(spec: PatternSpec) -> list[str]:
    """The families that a spec names, those of its parts included."""
    parts = [PatternSpec.from_dict(part) for part in spec.params.get("parts", [])]
    return [spec.name, *(name for part in parts for name in _family_names(part))]


@lru_cache(maxsize=1024)
def _draw(attention: AttentionSpec, tokens: int, num_heads: int, causal: bool, most: int) -> tuple[Panel, ...] | str:
    """The panels of one layer. A pattern may be the user's own code, so whatever it raises becomes the reason."""
    if attention.pattern is not None and attention.pattern.name == ADAPTIVE:
        return "not drawn: learned, its blocks depend on the data"
    try:
        rule = patterns.build(attention.rule)
        block, density = attention.block_size, attention.density
        layout = rule.layout(
            tokens, num_heads=num_heads, q_block_size=block, causal=causal, density=density, or_least=True
        )
    except Exception as error:
        return cut(f"not drawn: {type(error).__name__}: {error}", 200)
    return _panels(layout, most)


def _panels(layout: BlockLayout, most: int) -> tuple[Panel, ...]:
    heads: dict[tuple[str, ...], int] = {}
    for group in range(layout.num_groups):
        heads.setdefault(_rows(layout, group), group)
        if len(heads) == most:
            break
    alike = len(heads) == 1
    return tuple(Panel("all heads" if alike else f"head {head}", rows) for rows, head in heads.items())


def _rows(layout: BlockLayout, group: int) -> tuple[str, ...]:
    kept, allowed = layout.picture(group, MAX_CELLS)
    return tuple(
        "".join(str(-(-4 * have // can)) if can else ABOVE for have, can in zip(kept_row, allowed_row, strict=True))
        for kept_row, allowed_row in zip(kept.tolist(), allowed.tolist(), strict=True)
    )


def _add_panel(figure: go.Figure, panel: Panel, tokens: int, row: int, column: int) -> None:
    cell = tokens / len(panel.rows)
    shades = [colour(f"picture{level}") for level in range(5)]
    figure.add_trace(
        go.Heatmap(
            z=[[None if mark == ABOVE else int(mark) for mark in marks] for marks in panel.rows],
            x0=cell / 2,
            dx=cell,
            y0=cell / 2,
            dy=cell,
            zmin=-0.5,
            zmax=4.5,
            colorscale=[[(level + step) / 5, shade] for level, shade in enumerate(shades) for step in (0, 1)],
            showscale=False,
            xgap=1,
            ygap=1,
            customdata=[[_SHARES[mark] for mark in marks] for marks in panel.rows],
            hovertemplate="queries near %{y:,.0f}, keys near %{x:,.0f}<br>%{customdata}<extra></extra>",
        ),
        row,
        column,
    )
    ticks = [0, tokens // 2, tokens]
    figure.update_xaxes(range=[0, tokens], tickvals=ticks, tickformat=",", title_text="key", row=row, col=column)
    figure.update_yaxes(range=[tokens, 0], tickvals=ticks, tickformat=",", title_text="query", row=row, col=column)
    anchor = figure.data[-1].xaxis or "x"
    figure.update_yaxes(
        scaleanchor=anchor, constrain="domain", constraintoward="top", showgrid=False, row=row, col=column
    )
    figure.update_xaxes(constrain="domain", showgrid=False, row=row, col=column)
