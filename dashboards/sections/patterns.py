"""A heat map for each distinct pattern, those on a front first."""

from __future__ import annotations

from dashboards.figures.pareto import pareto_info
from dashboards.figures.pictures import picture_plot
from dashboards.frames import Results, Trial, search_command
from dashboards.markup import Markup, element
from dashboards.page import Page
from dashboards.sections.frame import note, nothing_yet, section
from raybsa.spec import canonical_json

MAX_PICTURES = 24


def patterns_section(page: Page, results: Results, folder: str) -> Markup:
    distinct = distinct_patterns(results)
    if not distinct:
        return section("patterns", "Pattern pictures", nothing_yet("No trial has finished yet", search_command(folder)))
    shown = distinct[:MAX_PICTURES]
    caption = "Queries run down, keys to the right, in tokens. The stronger a cell, the more of its blocks are kept."
    if len(shown) < len(distinct):
        caption += f" {len(shown)} of {len(distinct)} patterns are shown, those on a front first."
    cards = (_card(page, trial) for trial in shown)
    return section("patterns", "Pattern pictures", note(caption), element("div", *cards, class_="cards small"))


def distinct_patterns(results: Results) -> list[Trial]:
    """One trial for each rule (whatever its density): one on a front if there is one.

    Failed trials and rows of the gpu suite are left out.
    """
    front = {point.trial.id for trials in results.quality_groups for point in pareto_info(trials).front}
    distinct: dict[str, Trial] = {}
    finished = [trial for trial in results.trials if not trial.failed and not trial.is_of_kernels]
    for trial in sorted(finished, key=lambda trial: trial.id not in front):
        rules = [layer.rule.to_dict() for layer in trial.spec.attention]
        distinct.setdefault(canonical_json(rules), trial)
    return list(distinct.values())


def _card(page: Page, trial: Trial) -> Markup:
    drawing = page.drawing_of(trial)
    body = note(drawing.problem) if drawing.problem else page.figure(picture_plot(drawing), trial.label)
    return element("div", element("h4", trial.label, title=trial.whole_label), body, class_="card")
