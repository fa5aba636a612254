"""Every trial that did not finish, with its error as it was recorded; numbers that are none; what cannot be read."""

from __future__ import annotations

from dashboards.frames import Results, Trial
from dashboards.markup import Column, Markup, element, table
from dashboards.sections.frame import section
from dashboards.wording import moment

_HEAD = [Column("trial"), Column("when"), Column("task"), Column("pattern", "text"), Column("error")]


def failures_section(results: Results) -> Markup:
    failed = [_row(trial, _error(trial)) for trial in results.failures]
    odd = [_row(trial, _not_finite(trial)) for trial in results.trials if trial.not_finite]
    unread = [element("p", f"Not readable: {problem}") for problem in results.problems]
    shown = table(_HEAD, failed + odd) if failed + odd else None if unread else element("p", "None.")
    return section("failures", "Failed trials", shown, *unread)


def _row(trial: Trial, words: str) -> list[Markup | str]:
    record = trial.record
    name = element("span", trial.label, title=trial.whole_label)
    return [trial.id, moment(record.created_at or "–"), record.task, name, element("pre", words)]


def _error(trial: Trial) -> str:
    return trial.record.error or f"status {trial.record.status!r}, no error recorded"


def _not_finite(trial: Trial) -> str:
    """What was measured and is in no figure and on no front."""
    return ", ".join(f"{name} is {value}" for name, value in trial.not_finite.items())
