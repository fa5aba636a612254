"""Memory: peaks against length, beside other libraries', dense attention's and what the origin claimed."""

from __future__ import annotations

from dashboards.app.view import Shown, View, waiting
from dashboards.frames import benchmark_command
from dashboards.markup import element, join
from dashboards.sections.frame import section
from dashboards.sections.peers import peer_rows, peers_memory
from dashboards.sections.speed import speed_memory

TITLE = "Memory"


def show(view: View) -> Shown:
    found = [(device, peers_memory(view.page, rows)) for device, rows in peer_rows(view.results).items()]
    kernels = [join(element("h3", f"On {device}"), part) for device, part in found if part is not None]
    speed = speed_memory(view.page, view.results)
    if not kernels and speed is None:
        command = benchmark_command(view.folder)
        missing = waiting(
            view, "No benchmark has measured memory yet", f"{command} --suite cpu", f"{command} --suite gpu --peers"
        )
        return Shown(section("memory", "Memory", missing))
    return Shown(section("memory", "Memory", *kernels, speed))
