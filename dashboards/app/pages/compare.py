"""Compare: any two runs of the folder, side by side."""

from __future__ import annotations

from collections import defaultdict

from dashboards.app.filters import Option
from dashboards.app.view import Control, Shown, View, waiting
from dashboards.frames import Results, Trial, search_command
from dashboards.sections.frame import section
from dashboards.sections.two_runs import two_runs_section
from dashboards.wording import moment

TITLE = "Compare"


def show(view: View) -> Shown:
    runs: dict[str, list[Trial]] = defaultdict(list)
    for trial in view.results.trials:
        runs[trial.record.run_id or "–"].append(trial)
    if len(runs) < 2:
        command = search_command(view.folder)
        return Shown(section("compare", "Two runs", waiting(f"Two runs are compared, {len(runs)} is here", command)))
    names = list(runs)
    b = _asked(view, "b", runs, names[-1])
    a = _asked(view, "a", runs, _before(runs, b))
    offered = [Option(name, _label(name, trials)) for name, trials in runs.items()]
    content = two_runs_section(view.page, *(Results(tuple(runs[name]), view.results.series) for name in (a, b)))
    return Shown(content, None, (Control("a", "A", offered, a), Control("b", "B", offered, b)))


def _asked(view: View, name: str, runs: dict[str, list[Trial]], otherwise: str) -> str:
    asked = view.address.one(name)
    return asked if asked in runs else otherwise


def _before(runs: dict[str, list[Trial]], name: str) -> str:
    """The last other run of the same job, else of any."""
    others = [other for other in runs if other != name]
    alike = [other for other in others if runs[other][0].record.job == runs[name][0].record.job]
    return (alike or others)[-1]


def _label(name: str, trials: list[Trial]) -> str:
    first = trials[0].record
    return f"{name} · {first.job} · {moment(first.created_at or '–')} · {len(trials):,} trials"
