"""Recovery: what each failure of a training cost, and its tokens a second through it."""

from __future__ import annotations

import statistics

from dashboards.figures.recovery import PARTS, RecoveryInfo, parts_plot, recovery_info, speed_plot
from dashboards.frames import Results, Trial
from dashboards.markup import Markup, element, join
from dashboards.page import Page
from dashboards.sections.frame import note, section
from dashboards.wording import number

_SHOWN = 4


def recovery_section(page: Page, results: Results) -> Markup | None:
    """The trainings with the most recoveries; nothing where none had any."""
    told = []
    for trial in sorted(results.recovered, key=lambda t: -t.record.failures_survived):
        tokens = trial.spec.train_len * int(trial.spec.task_params.get("train_batch", 8))
        info = recovery_info(results.series.get(trial.id, ()), tokens)
        if info is not None:
            told.append((trial, info))
    if not told:
        return None
    legend = (element("span", element("i", class_=f"swatch {part}"), f"{part}: {PARTS[part][2]}") for part in PARTS)
    rest = note(f"{len(told) - _SHOWN} more trainings had recoveries.") if len(told) > _SHOWN else None
    parts = (_training(page, trial, info) for trial, info in told[:_SHOWN])
    return section("recovery", "Recovery", element("div", *legend, class_="legend"), *parts, rest)


def _training(page: Page, trial: Trial, info: RecoveryInfo) -> Markup:
    count, ranks = len(info.spans), trial.record.world_size
    middle = statistics.median(resumed - noticed for noticed, resumed in info.spans)
    title = f"{count} recover{'y' if count == 1 else 'ies'} of {trial.id}, {ranks} ranks"
    told = f"From notice to training again (shaded): {number(middle)} s in the middle."
    cards = (
        element("div", element("h4", name), page.figure(figure, f"{name}: {title}"), class_="card")
        for name, figure in (("Each recovery", parts_plot(info)), ("Tokens a second", speed_plot(info)))
    )
    return join(element("h3", title), note(told), element("div", *cards, class_="cards wide"))
