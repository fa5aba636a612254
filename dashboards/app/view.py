"""What a page is asked to show, and what it answers."""

from __future__ import annotations

from typing import NamedTuple

from dashboards.app.address import Address
from dashboards.app.filters import Option, filtered, told
from dashboards.frames import Results
from dashboards.markup import Markup, element, join
from dashboards.page import Page
from dashboards.sections.frame import note
from dashboards.wording import counted


class View(NamedTuple):
    """The rows that the filters leave, how many they ``hide``, and the address; ``page`` collects figures."""

    page: Page
    results: Results
    hidden: int
    folder: str
    address: Address


def view_of(page: Page, everything: Results, folder: str, address: Address) -> View:
    """What the address's filters leave of a folder's rows."""
    results = filtered(everything, address)
    return View(page, results, len(everything.trials) - len(results.trials), folder, address)


class Control(NamedTuple):
    """A choice of one value that a page offers beside the filters."""

    name: str
    label: str
    options: list[Option]
    value: str

    @property
    def label_of_value(self) -> str:
        """How what is chosen reads."""
        return next(option.label for option in self.options if option.value == self.value)


class Shown(NamedTuple):
    """A page's content: controls, what comes first, and what comes after the chosen trial."""

    top: Markup
    rest: Markup | None = None
    controls: tuple[Control, ...] = ()


def waiting(view: View, what: str, *commands: str) -> Markup:
    """Instead of an empty page: what is missing and what to run, or which filters leave nothing of what is there."""
    if view.hidden:
        left = "The filters leave nothing to show here"
        return element("p", f"{left}: {told(view.address)}. They hide {counted(view.hidden, 'row')}.")
    lines = (element("li", element("code", command)) for command in commands)
    return join(
        element("p", f"{what}. This fills it:"),
        element("ul", *lines),
        note("Rows appear here as they are written, without a reload."),
    )
