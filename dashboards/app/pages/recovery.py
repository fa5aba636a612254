"""Recovery, as in the report."""

from __future__ import annotations

from dashboards.app.view import Shown, View, waiting
from dashboards.sections.frame import section
from dashboards.sections.recovery import recovery_section

TITLE = "Recovery"


def show(view: View) -> Shown:
    found = recovery_section(view.page, view.results)
    missing = waiting(
        view, "No training has survived a failure yet", f"python jobs/recovery_drill.py --out {view.folder}"
    )
    return Shown(found or section("recovery", TITLE, missing))
