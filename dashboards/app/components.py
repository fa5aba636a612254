"""Elements of a page -> Dash components. Texts stay texts: no row's text is ever read as HTML."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from dash import dcc, html
from dash.development.base_component import Component

from dashboards.figures.pictures import ABOVE, Drawing, Panel
from dashboards.markup import Markup
from dashboards.page import Page
from dashboards.theme import PALETTE, dark_twins

_NAMES = {"class": "className", "tabindex": "tabIndex", "colspan": "colSpan"}
_CONFIG = {"displayModeBar": False, "responsive": True}
_HEX = re.compile(r"#[0-9a-f]{6}")
_THUMBNAIL, _PICTURE = 64, 136  # pixels of an image alone in its cell, and of one among several


def components(markup: Markup, page: Page, *, dark: bool) -> list[Component | str]:
    """The components of an element (of all children, where it has no tag), in the reader's colours."""
    return list(_Maker(page, dark).made(markup))


def themed(figure: dict, dark: bool) -> dict:
    """A figure in the reader's colours."""
    if not dark:
        return figure
    twins = dark_twins()
    return json.loads(_HEX.sub(lambda found: twins.get(found[0], found[0]), json.dumps(figure)))


def thumbnail(panel: Panel) -> str:
    """A panel as a data URI of an SVG image: one path a shade, in colours that follow the reader's."""
    rules = {False: "", True: ""}
    paths = ""
    for mark in (ABOVE, *"01234"):
        cells = "".join(f"M{x} {y}h{n}v1h-{n}z" for y, row in enumerate(panel.rows) for x, n in _runs(row, mark))
        shades = PALETTE["card" if mark == ABOVE else f"picture{mark}"]
        name = "above" if mark == ABOVE else f"m{mark}"
        paths += f'<path class="{name}" d="{cells}"/>'
        rules = {dark: rules[dark] + f".{name}{{fill:{shades[dark]}}}" for dark in rules}
    style = f"<style>{rules[False]}@media(prefers-color-scheme:dark){{{rules[True]}}}</style>"
    size = f'viewBox="0 0 {len(panel.rows[0])} {len(panel.rows)}" shape-rendering="crispEdges"'
    image = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{paths}</svg>'
    return f"data:image/svg+xml;base64,{b64encode(image.encode()).decode()}"


def _runs(row: str, mark: str) -> list[tuple[int, int]]:
    """Where a mark stands in a row: (first column, columns) of each run."""
    return [(found.start(), len(found[0])) for found in re.finditer(f"{re.escape(mark)}+", row)]


def thumbnails(drawing: Drawing, side: int) -> html.Div:
    """A drawing's panels as small images, or why there are none."""
    made = [
        html.Figure(
            [html.Img(src=thumbnail(panel), width=side, height=side, alt=panel.caption), html.Figcaption(panel.caption)]
        )
        for panel in drawing.panels
    ]
    return html.Div(
        [*made, html.P(drawing.problem or f"at {drawing.tokens:,} tokens", className="note")], className="pictures"
    )


class _Maker:
    def __init__(self, page: Page, dark: bool) -> None:
        self._page, self._dark = page, dark

    def made(self, child: Markup | str) -> list[Component | str]:
        if isinstance(child, str):
            return [child]
        inside = [part for own in child.children for part in self.made(own)]
        if not child.tag:
            return inside
        attributes = child.attributes
        if "data-figure" in attributes:
            return [self._graph(attributes)]
        if "data-drawing" in attributes:
            drawing = self._page.drawings[str(attributes["data-drawing"])]
            whole = attributes.get("class") == "pictures"
            return [thumbnails(drawing, _PICTURE) if whole else self._thumbnail(drawing)]
        made = getattr(html, child.tag.capitalize())(inside, **_arguments(attributes))
        to_copy = child.tag == "pre" and attributes.get("class") == "copied"
        return [made, copy_button(_text(child))] if to_copy else [made]

    def _graph(self, attributes: Mapping[str, str | bool]) -> Component:
        figure = themed(self._page.figures[str(attributes["data-figure"])], self._dark)
        figure["layout"]["uirevision"] = "kept"  # a reader's zoom outlives new rows
        graph: dict[str, Any] = {"figure": figure, "config": _CONFIG, "responsive": True}
        graph["style"] = {"height": f"{figure['layout']['height']}px"}
        if "data-panel" in attributes:
            graph["id"] = {"type": "front", "name": attributes["data-panel"]}
            figure["data"] = [_spoken(trace) for trace in figure["data"]]
        around: dict[str, Any] = {"aria-label": attributes["aria-label"], "role": "img", "className": "figure"}
        return html.Div(dcc.Graph(**graph), **around)

    def _thumbnail(self, drawing: Drawing) -> Component | str:
        if not drawing.panels:
            return ""
        return html.Img(src=thumbnail(drawing.panels[0]), width=_THUMBNAIL, height=_THUMBNAIL, alt="its blocks")


def copy_button(text: str) -> dcc.Clipboard:
    """A button that copies ``text``."""
    return dcc.Clipboard(content=text, title="Copy", className="copy", children="Copy", copied_children="Copied")


def _spoken(trace: dict) -> dict:
    """A trace whose points tell their hover text: the report's script has a panel for that."""
    return trace | {"hoverinfo": "text"} if trace.get("hovertext") else trace


def _text(child: Markup | str) -> str:
    return child if isinstance(child, str) else "".join(map(_text, child.children))


def _arguments(attributes: Mapping[str, str | bool]) -> dict[str, Any]:
    return {_NAMES.get(n, n): _style(str(v)) if n == "style" else v for n, v in attributes.items() if n != "scope"}


def _style(text: str) -> dict[str, str]:
    """``{"minHeight": "3px"}`` of ``min-height:3px``."""
    pairs = (part.split(":", 1) for part in text.split(";") if part)
    return {re.sub("-(.)", lambda found: found[1].upper(), name.strip()): value.strip() for name, value in pairs}
