"""One self-contained HTML page: what a section collects while it is written, and the frame around all of them."""

from __future__ import annotations

import json
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from dashboards.figures.pictures import Drawing, drawing_info
from dashboards.frames import Trial
from dashboards.markup import Markup, data_island, element, join
from dashboards.theme import css_variables, dark_twins
from dashboards.wording import paste

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class Page:
    """Collects what the page's script needs (figures, trials, drawings), each once, while sections are written."""

    def __init__(self, own_patterns: bool = False) -> None:
        self._own_patterns = own_patterns
        self._figures: dict[str, object] = {}
        self._trials: dict[str, object] = {}
        self._drawings: dict[Drawing, str] = {}

    def figure(self, figure: go.Figure, label: str, panel: str | None = None) -> Markup:
        """A place where the script draws ``figure``. Its points name trials where ``panel`` shows the one clicked."""
        name = f"figure-{len(self._figures)}"
        self._figures[name] = json.loads(figure.to_json())
        height = f"min-height:{figure.layout.height}px"
        attributes = {"data-figure": name, "data-panel": panel, "aria-label": label}
        return element("div", class_="figure", role="img", style=height, **attributes)

    def drawing_of(self, trial: Trial) -> Drawing:
        """The trial's pattern drawn."""
        return drawing_info(trial.spec, self._own_patterns)

    def drawing(self, trial: Trial) -> str:
        """The name by which the script finds a trial's drawing; equal ones are kept once."""
        return self._drawings.setdefault(self.drawing_of(trial), str(len(self._drawings)))

    def trial(self, trial: Trial, label: str, facts: list[tuple[str, str]]) -> None:
        """Makes a trial known to hover and click."""
        known = {"label": label, "facts": facts, "paste": paste(trial.spec), "drawing": self.drawing(trial)}
        self._trials[trial.id] = known

    def render(self, title: str, body: Markup) -> str:
        """The whole document; opens without a network, and is forbidden to use one."""
        light, dark = css_variables(dark=False), css_variables(dark=True)
        style = f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        data = {
            "twins": dark_twins(),
            "figures": self._figures,
            "trials": self._trials,
            "drawings": {
                name: {"tokens": d.tokens, "panels": d.panels, "problem": d.problem}
                for d, name in self._drawings.items()
            },
        }
        head = join(
            Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            element("title", title),
            element("style", Markup(style + (_HERE / "page.css").read_text("utf-8"))),
            element("script", Markup(get_plotlyjs())),
        )
        script = element("script", Markup((_HERE / "page.js").read_text("utf-8")))
        tip = element("div", id="tip", class_="tip trial", hidden=True)
        whole = element("body", body, tip, data_island("report-data", data), script)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>{whole}</html>\n'
