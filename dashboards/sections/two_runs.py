"""Two runs compared: what they ran on, their fronts, and every question that both answered."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from dashboards.figures.pareto import pareto_info
from dashboards.figures.two_runs import NAMES, Pair, changes_plot, fronts_plot, pairs
from dashboards.frames import Results, Trial
from dashboards.markup import Column, Markup, element, join, table
from dashboards.page import Page
from dashboards.sections.frame import listed, note, section
from dashboards.wording import counted, milliseconds, moment, quality, ratio, size, times

_MOST = 200  # rows of the table


def two_runs_section(page: Page, a: Results, b: Results) -> Markup:
    """Runs A and B, each with its trials alone."""
    legend = element("div", *map(_swatch, NAMES, ("own", "rival")), class_="legend")
    found = pairs(a.trials, b.trials)
    return section(
        "compare", "Two runs", _facts(a.trials, b.trials), legend, _fronts(page, a, b), _changes(page, found)
    )


def _swatch(name: str, meaning: str) -> Markup:
    return element("span", element("i", class_="swatch", style=f"background:var(--{meaning})"), f"run {name}")


def _facts(a: Sequence[Trial], b: Sequence[Trial]) -> Markup:
    rows = [[name, *(read(trials) or "–" for trials in (a, b))] for name, read in _FACTS.items()]
    return table([Column(""), Column("A", "text"), Column("B", "text")], rows)


def _when(trials: Sequence[Trial]) -> str:
    return moment(min((t.record.created_at for t in trials if t.record.created_at), default=""))


_FACTS = {
    "run": lambda trials: listed(t.record.run_id for t in trials),
    "job": lambda trials: listed(t.record.job for t in trials),
    "began": _when,
    "trials": lambda trials: f"{len(trials):,}",
    "failed": lambda trials: f"{sum(t.record.status == 'failed' for t in trials):,}",
    "device": lambda trials: listed(t.record.device_name or t.record.device for t in trials),
    "torch": lambda trials: listed(t.record.torch_version for t in trials),
    "commit": lambda trials: listed((t.record.git_commit or "")[:12] for t in trials),
}


def _fronts(page: Page, a: Results, b: Results) -> Markup:
    by_question = {trials[0].question: trials for trials in b.quality_groups}
    for trials in a.quality_groups:
        if trials[0].question in by_question:
            infos = [pareto_info(trials), pareto_info(by_question[trials[0].question])]
            if infos[0].latency == infos[1].latency and all(info.front for info in infos):
                picture = page.figure(fronts_plot(infos), "The fronts of both runs")
                return join(element("h3", "Fronts"), element("div", picture, class_="card"))
    return join(element("h3", "Fronts"), note("They have no question with a measured quality in common."))


def _changes(page: Page, found: Sequence[Pair]) -> Markup:
    heading = element("h3", "What both ran")
    if not found:
        return join(heading, note("No trial of one has the spec of a trial of the other."))
    figure = changes_plot(found)
    slower = [pair.slower for pair in found if pair.slower is not None]
    told = f"{counted(len(found), 'trial')} of the same spec and seed."
    told += (
        f" In the middle, B takes {times(median(slower))} the time of A. Bars have the colour of the faster one."
        if slower
        else ""
    )
    told += f" The table holds the first {_MOST}." if len(found) > _MOST else ""
    head = [Column("trial", "text")]
    head += [
        Column(name, "right")
        for name in ("time A", "time B", "B / A", "quality A", "quality B", "memory A", "memory B", "B / A")
    ]
    drawn = None if figure is None else element("div", page.figure(figure, "Time of B over A"), class_="card")
    return join(heading, note(told), drawn, table(head, map(_cells, found[:_MOST])))


def _cells(pair: Pair) -> list[str]:
    a, b = pair.a.record, pair.b.record
    return [
        pair.label,
        *(milliseconds(r.forward_backward_ms_p50 or r.forward_ms_p50) for r in (a, b)),
        times(pair.slower),
        *(quality(r.quality) for r in (a, b)),
        *(size(r.peak_bytes) for r in (a, b)),
        times(ratio(b.peak_bytes, a.peak_bytes)),
    ]
