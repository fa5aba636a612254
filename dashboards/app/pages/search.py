"""Search: one question's front; a click on a point shows its trial below and beside it."""

from __future__ import annotations

from dashboards.app.filters import Option
from dashboards.app.view import Control, Shown, View, waiting
from dashboards.figures.pareto import ParetoInfo, Point, pareto_info
from dashboards.frames import Trial, search_command
from dashboards.markup import Markup, join
from dashboards.sections.failures import failures_section
from dashboards.sections.frame import asked, note, section
from dashboards.sections.header import density_legend
from dashboards.sections.quality import NOTHING_TIMED, curves_part, front_figure, front_table, how_to_read
from dashboards.sections.trial import trial_card, trial_detail
from raybsa.spec import stable_hash

TITLE = "Search"


def show(view: View) -> Shown:
    groups = {stable_hash(trials[0].question): trials for trials in view.results.quality_groups}
    if not groups:
        missing = waiting(view, "No trial has measured a quality yet", search_command(view.folder))
        failed = failures_section(view.results) if view.results.trials else None
        return Shown(section("quality", "Search", missing), failed)
    name = _name(view, groups)
    info = pareto_info(groups[name])
    labels = [Option(key, f"{asked(trials[0])} ({len(trials)} trials)") for key, trials in groups.items()]
    figure = (
        (note(how_to_read(info)), front_figure(view.page, info, "front"))
        if info.front
        else (waiting(view, NOTHING_TIMED, search_command(view.folder)),)
    )
    top = section("quality", asked(groups[name][0]), density_legend(ideal=False), *figure)
    rest = (curves_part(view.page, view.results, info), front_table(view.page, info)) if info.front else ()
    return Shown(top, join(*rest, failures_section(view.results)), (Control("question", "question", labels, name),))


def chosen(view: View) -> tuple[Markup, Markup] | None:
    """The trial of the address, else the first of the front: its card and its figures; None without any."""
    groups = {stable_hash(trials[0].question): trials for trials in view.results.quality_groups}
    if not groups:
        return None
    info = pareto_info(groups[_name(view, groups)])
    trial = view.address.one("trial")
    point = _point(info, trial)
    missing = None
    if trial is not None and (point is None or point.trial.id != trial):
        instead = "" if point is None else "; what is shown is the first of the front"
        missing = note(f"No trial {trial!r} is here{instead}.")
    if point is None:
        return None if missing is None else (missing, join())
    return join(missing, trial_card(view.page, info, point)), trial_detail(view.page, view.results, info, point)


def _name(view: View, groups: dict[str, list[Trial]]) -> str:
    """The question of the address, else that of its trial, else the one with the most trials."""
    asked, trial = view.address.one("question"), view.address.one("trial")
    if asked in groups:
        return asked or ""
    holding = (name for name, trials in groups.items() if any(t.id == trial for t in trials))
    return next(holding, next(iter(groups)))


def _point(info: ParetoInfo, trial: str | None) -> Point | None:
    named = (point for point in info.points if point.trial.id == trial)
    return next(named, next(iter(info.front), None))
