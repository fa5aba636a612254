"""Benchmark: our kernels beside other libraries' and the ideal, and speed against length."""

from __future__ import annotations

from dashboards.app.view import Shown, View, waiting
from dashboards.frames import benchmark_command
from dashboards.markup import join
from dashboards.sections.frame import section
from dashboards.sections.peers import peers_section
from dashboards.sections.speed import speed_section

TITLE = "Benchmark"


def show(view: View) -> Shown:
    kernels = peers_section(view.page, view.results, memory=False)
    speed = speed_section(view.page, view.results, view.folder) if view.results.speed_groups else None
    if kernels is None and speed is None:
        command = benchmark_command(view.folder)
        missing = waiting(view, "No benchmark has run yet", f"{command} --suite cpu", f"{command} --suite gpu --peers")
        return Shown(section("benchmark", "Benchmark", missing))
    return Shown(join(kernels, speed))
