"""A page as data: elements that hold elements and plain text. The report writes them as HTML, in which every text is
escaped; the app makes components of the same elements."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple


@dataclass(frozen=True)
class Markup:
    """An element; without a tag, its children side by side. Strings among the children are plain text."""

    tag: str
    attributes: Mapping[str, str | bool]
    children: tuple[Markup | str, ...]


Child = Markup | str | None


def element(tag: str, *children: Child, **attributes: str | bool | None) -> Markup:
    """``<tag attributes>children</tag>``; None is left out of both.

    Underscores in attribute names become dashes, one at the end is dropped (``class_``); True stands alone.
    """
    named = {
        name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value not in (None, False)
    }
    return Markup(tag, named, _known(children))


def join(*children: Child) -> Markup:
    """The children side by side."""
    return Markup("", {}, _known(children))


class Column(NamedTuple):
    """A column's heading and the CSS class of its cells: ``"text"`` may wrap, ``"right"`` holds numbers."""

    title: str
    kind: str | None = None


def table(head: Sequence[Column], rows: Iterable[Sequence[Markup | str]]) -> Markup:
    """A table that scrolls sideways by itself where it is too wide."""
    top = element("tr", *(element("th", column.title, scope="col", class_=column.kind) for column in head))
    body = (
        element("tr", *(element("td", cell, class_=column.kind) for column, cell in zip(head, row, strict=True)))
        for row in rows
    )
    whole = element("table", element("thead", top), element("tbody", *body), class_="numbers")
    return element("div", whole, class_="scroll", tabindex="0")


def html(markup: Markup | str) -> str:
    """The HTML of an element or a text; the text is escaped."""
    if isinstance(markup, str):
        return escape(markup)
    inside = "".join(map(html, markup.children))
    if not markup.tag:
        return inside
    pairs = "".join(f" {n}" if v is True else f' {n}="{escape(str(v))}"' for n, v in markup.attributes.items())
    return f"<{markup.tag}{pairs}>{inside}</{markup.tag}>"


def data_island(identifier: str, value: object) -> str:
    """JSON as HTML that a script can read and that no text in it can leave."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(identifier)}">{text}</script>'


def _known(children: Iterable[Child]) -> tuple[Markup | str, ...]:
    return tuple(child for child in children if child is not None)
