"""Every trial that did not finish, with its error as it was recorded."""

from __future__ import annotations

from dashboards.frames import Results, Trial
from dashboards.markup import Column, Markup, element, table
from dashboards.sections.frame import section
from dashboards.wording import moment

_HEAD = [Column("trial"), Column("when"), Column("task"), Column("pattern", "text"), Column("error")]


def failures_section(results: Results) -> Markup:
    rows = [_row(trial) for trial in results.failures]
    return section("failures", "Failed trials", table(_HEAD, rows) if rows else element("p", "None."))


def _row(trial: Trial) -> list[Markup | str]:
    record = trial.record
    error = element("pre", record.error or f"status {record.status!r}, no error recorded")
    return [
        trial.id,
        moment(record.created_at or "–"),
        record.task,
        element("span", trial.label, title=trial.whole_label),
        error,
    ]
