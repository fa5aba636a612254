"""What the sections of a page collect while they are written, and the report's frame around all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dashboards.figures.pictures import MAX_PANELS, Drawing, drawing_info
from dashboards.frames import Trial
from dashboards.markup import Markup, data_island, element, html
from dashboards.theme import css_variables, dark_twins
from dashboards.wording import paste

STYLE = Path(__file__).parent / "page.css"
_SCRIPT = Path(__file__).parent / "page.js"
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class Told(NamedTuple):
    """A trial that figures point at: its title, and its numbers in words."""

    trial: Trial
    label: str
    facts: list[tuple[str, str]]


class Page:
    """Collects what the page's figures need (figures, trials, drawings), each once, while sections are written."""

    def __init__(self, own_patterns: bool = False) -> None:
        self._own_patterns = own_patterns
        self.figures: dict[str, dict] = {}
        self.drawings: dict[str, Drawing] = {}
        self.trials: dict[str, Callable[[], Told]] = {}
        self._drawn: dict[Drawing, str] = {}

    def figure(self, figure: go.Figure, label: str, panel: str | None = None) -> Markup:
        """A place where ``figure`` is drawn. Its points name trials where ``panel`` shows the one clicked."""
        name = f"figure-{len(self.figures)}"
        self.figures[name] = json.loads(figure.to_json(validate=False))
        height = f"min-height:{figure.layout.height}px"
        attributes = {"data-figure": name, "data-panel": panel, "aria-label": label}
        return element("div", class_="figure", role="img", style=height, **attributes)

    def drawing_of(self, trial: Trial, most: int = MAX_PANELS) -> Drawing:
        """The trial's pattern drawn, ``most`` panels of it."""
        return drawing_info(trial.spec, self._own_patterns, most)

    def drawing(self, trial: Trial) -> str:
        """The name of a trial's drawing; equal ones are kept once."""
        drawing = self.drawing_of(trial)
        name = self._drawn.setdefault(drawing, str(len(self._drawn)))
        self.drawings[name] = drawing
        return name

    def trial(self, trial: Trial, told: Callable[[], Told]) -> None:
        """Makes a trial known to hover and click; what is told of it is asked for only where it is shown."""
        self.trials[trial.id] = told


def render(page: Page, title: str, body: Markup) -> str:
    """The report's whole document; opens without a network, and is forbidden to use one."""
    light, dark = css_variables(dark=False), css_variables(dark=True)
    style = f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    trials = {name: _known(page, told()) for name, told in page.trials.items()}
    drawings = {n: {"tokens": d.tokens, "panels": d.panels, "problem": d.problem} for n, d in page.drawings.items()}
    data = {"twins": dark_twins(), "figures": page.figures, "trials": trials, "drawings": drawings}
    tip = element("div", id="tip", class_="tip trial", hidden=True)
    return "".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{escape(title)}</title><style>{style}{STYLE.read_text('utf-8')}</style>",
            f"<script>{get_plotlyjs()}</script></head><body>{html(body)}{html(tip)}",
            f"{data_island('report-data', data)}<script>{_SCRIPT.read_text('utf-8')}</script></body></html>\n",
        )
    )


def _known(page: Page, told: Told) -> dict:
    return {
        "label": told.label,
        "facts": told.facts,
        "paste": paste(told.trial.spec),
        "drawing": page.drawing(told.trial),
    }
