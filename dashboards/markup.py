"""HTML from data: every text is escaped unless this module made it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | None


def element(tag: str, *children: Child, **attributes: str | bool | None) -> Markup:
    """``<tag attributes>children</tag>``. Plain strings are escaped, ``Markup`` is not, None is left out.

    Underscores in attribute names become dashes, one at the end is dropped (``class_``); True stands alone.
    """
    pairs = "".join(_attribute(name, value) for name, value in attributes.items() if value not in (None, False))
    return Markup(f"<{tag}{pairs}>{join(*children)}</{tag}>")


def join(*children: Child) -> Markup:
    """The children side by side, escaped where they are plain strings."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))


class Column(NamedTuple):
    """A column's heading and the CSS class of its cells: ``"text"`` may wrap, ``"right"`` holds numbers."""

    title: str
    kind: str | None = None


def table(head: Sequence[Column], rows: Iterable[Sequence[str]]) -> Markup:
    """A table that scrolls sideways by itself where it is too wide."""
    top = element("tr", *(element("th", column.title, scope="col", class_=column.kind) for column in head))
    body = (
        element("tr", *(element("td", cell, class_=column.kind) for column, cell in zip(head, row, strict=True)))
        for row in rows
    )
    whole = element("table", element("thead", top), element("tbody", *body), class_="numbers")
    return element("div", whole, class_="scroll", tabindex="0")


def data_island(identifier: str, value: object) -> Markup:
    """JSON that a script can read and that no text in it can leave."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return Markup(f'<script type="application/json" id="{escape(identifier)}">{text}</script>')


def _attribute(name: str, value: str | bool | None) -> str:
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
