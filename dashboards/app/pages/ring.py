"""Ring, as in the report."""

from __future__ import annotations

from dashboards.app.view import Shown, View, waiting
from dashboards.sections.frame import section
from dashboards.sections.ring import ring_section

TITLE = "Ring"


def show(view: View) -> Shown:
    found = ring_section(view.page, view.results)
    missing = waiting(view, "No ring was measured yet", f"python jobs/benchmark.py --suite ring --out {view.folder}")
    return Shown(found or section("ring", TITLE, missing))
