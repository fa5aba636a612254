"""What a page is asked to show, and what it answers."""

from __future__ import annotations

from typing import NamedTuple

from dashboards.app.address import Address
from dashboards.app.filters import Option
from dashboards.frames import Results
from dashboards.markup import Markup, element, join
from dashboards.page import Page
from dashboards.sections.frame import note


class View(NamedTuple):
    """The rows that the filters leave, and the address; ``page`` collects figures."""

    page: Page
    results: Results
    folder: str
    address: Address


class Control(NamedTuple):
    """A choice of one value that a page offers beside the filters."""

    name: str
    label: str
    options: list[Option]
    value: str | None


class Shown(NamedTuple):
    """A page's content: controls, what comes first, and what comes after the chosen trial."""

    top: Markup
    rest: Markup | None = None
    controls: tuple[Control, ...] = ()


def waiting(what: str, *commands: str) -> Markup:
    """Instead of an empty page: what is missing and what to run."""
    lines = (element("li", element("code", command)) for command in commands)
    return join(
        element("p", f"{what}. This fills it:"),
        element("ul", *lines),
        note("Rows appear here as they are written, without a reload."),
    )
