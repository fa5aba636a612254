"""One trial: its numbers and its spec to copy; its blocks head by head, learning curve, memory and timeline."""

from __future__ import annotations

from dashboards.figures.curves import curves_info, curves_plot
from dashboards.figures.pareto import ParetoInfo, Point
from dashboards.figures.pictures import Drawing, picture_plot
from dashboards.figures.ring_timeline import timeline_info, timeline_plot
from dashboards.figures.trial_memory import trial_memory_plot
from dashboards.frames import Results, Trial
from dashboards.markup import Markup, element, join
from dashboards.page import Page
from dashboards.sections.frame import note
from dashboards.sections.quality import told
from dashboards.wording import paste
from raybsa.ring.timeline import from_series

MOST_HEADS = 8


def trial_card(page: Page, info: ParetoInfo, point: Point) -> Markup:
    """Title, pictures, numbers and the spec to copy."""
    shown = told(info, point)
    facts = (part for name, value in shown.facts for part in (element("dt", name), element("dd", value)))
    return join(
        element("h3", shown.label, title=shown.trial.whole_label),
        element("div", data_drawing=page.drawing(shown.trial), class_="pictures"),
        element("dl", *facts),
        element("pre", paste(shown.trial.spec), class_="copied"),
    )


def trial_detail(page: Page, results: Results, info: ParetoInfo, point: Point) -> Markup:
    """Its figures, each a card."""
    trial = point.trial
    return join(
        element("h3", f"Blocks of {trial.label}", title=trial.whole_label),
        _pictures(page, trial),
        element(
            "div",
            *_curves(page, results, info, point),
            _memory(page, trial),
            _timeline(page, results, trial),
            class_="cards wide",
        ),
    )


def _pictures(page: Page, trial: Trial) -> Markup:
    drawing = page.drawing_of(trial, MOST_HEADS)
    if drawing.problem:
        return note(drawing.problem)
    cards = (
        _card(
            panel.caption,
            page.figure(picture_plot(Drawing(drawing.tokens, (panel,))), f"{trial.label}: {panel.caption}"),
        )
        for panel in drawing.panels
    )
    told = "Queries run down, keys to the right, in tokens. The stronger a cell, the more of its blocks are kept. "
    told += "Heads that keep the same blocks are drawn once."
    return join(note(told), element("div", *cards, class_="cards small"))


def _curves(page: Page, results: Results, info: ParetoInfo, point: Point) -> list[Markup]:
    dense = [p.trial for p in info.points if p.trial.is_dense and p.trial.id != point.trial.id]
    shown = [*dense[:1], point.trial]
    curves = curves_info(results.points(shown), shown, {point.trial.id: point.rank or 0})
    if not curves:
        return [_card("Learning curve", note("No curve was recorded for this trial."))]
    return [
        _card(c.name.replace("_", " "), page.figure(curves_plot(c), f"{c.name} of {point.trial.label}")) for c in curves
    ]


def _memory(page: Page, trial: Trial) -> Markup:
    figure = trial_memory_plot(trial.record)
    missing = note("No memory was measured for this trial.")
    return _card("Peak memory", missing if figure is None else page.figure(figure, f"Peak memory of {trial.label}"))


def _timeline(page: Page, results: Results, trial: Trial) -> Markup:
    info = timeline_info(from_series(results.series.get(trial.id, ()), trial.id))
    if info is None:
        return _card("Timeline", note("None: one device has nothing to wait for. Trials over ranks record theirs."))
    return _card("Timeline", page.figure(timeline_plot(info), f"Timeline of {trial.label}"))


def _card(title: str, content: Markup) -> Markup:
    return element("div", element("h4", title), content, class_="card")
