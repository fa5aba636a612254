"""Compression, as in the report."""

from __future__ import annotations

from dashboards.app.view import Shown, View, waiting
from dashboards.sections.compression import compression_section
from dashboards.sections.frame import section

TITLE = "Compression"


def show(view: View) -> Shown:
    found = compression_section(view.page, view.results)
    missing = waiting(
        view,
        "No training with compressed gradients has finished yet",
        f"python jobs/compression.py --out {view.folder}",
    )
    return Shown(found or section("compression", TITLE, missing))
