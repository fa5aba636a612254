"""Compare: any two runs of the folder, side by side."""

from __future__ import annotations

from collections import defaultdict

from dashboards.app.filters import Option
from dashboards.app.view import Control, Shown, View, waiting
from dashboards.frames import Results, Trial, search_command
from dashboards.sections.frame import section
from dashboards.sections.two_runs import two_runs_section
from dashboards.wording import cut, moment

TITLE = "Compare"


def show(view: View) -> Shown:
    runs: dict[str, list[Trial]] = defaultdict(list)
    for trial in view.results.trials:
        runs[trial.record.run_id or "–"].append(trial)
    if len(runs) < 2:
        command = search_command(view.folder)
        return Shown(
            section("compare", "Two runs", waiting(view, f"Two runs are compared, {len(runs)} is here", command))
        )
    newest = list(reversed(runs))
    b = _asked(view, "b", runs, next((name for name in newest if _alike(runs, name)), newest[0]))
    others = [name for name in newest if name != b]
    a = _asked(view, "a", runs, (_alike(runs, b) or others)[0])
    offered = [Option(name, _label(name, trials)) for name, trials in runs.items()]
    content = two_runs_section(view.page, *(Results(tuple(runs[name]), view.results.series) for name in (a, b)))
    return Shown(content, None, (Control("a", "A", offered, a), Control("b", "B", offered, b)))


def _asked(view: View, name: str, runs: dict[str, list[Trial]], otherwise: str) -> str:
    asked = view.address.one(name)
    return asked if asked in runs else otherwise


def _alike(runs: dict[str, list[Trial]], name: str) -> list[str]:
    """The other runs of the same job and task, newest first."""
    first = runs[name][0].record
    kind = (first.job, first.task)
    others = ((other, trials[0].record) for other, trials in reversed(runs.items()) if other != name)
    return [other for other, record in others if (record.job, record.task) == kind]


def _label(name: str, trials: list[Trial]) -> str:
    first = trials[0].record
    return f"{cut(name)} · {first.job} · {moment(first.created_at or '–')} · {len(trials):,} trials"
