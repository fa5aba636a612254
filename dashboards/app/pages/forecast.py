"""Scaling forecast: the cost formula fitted to the rows at hand, or a published machine's, over many ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dashboards.app.filters import Option
from dashboards.app.view import Control, Shown, View, waiting
from dashboards.forecast import forecast_parts
from dashboards.markup import join
from dashboards.scalings import Scaling, measured_scalings, preset_scalings
from dashboards.sections.frame import note, section
from raybsa.experiments.forecast import Compared, compare, fit_rows, ring_rows
from raybsa.ring.hardware import PRESETS, Hardware

TITLE = "Forecast"
RANKS = 1024  # forecast up to this many
_HERE = "here"


def show(view: View) -> Shown:
    offered = [
        Option(_HERE, "fitted to the rows here"),
        *(Option(name, PRESETS[name].label) for name in sorted(PRESETS)),
    ]
    asked = view.address.one("hardware")
    name = asked if asked in PRESETS else _HERE
    control = (Control("hardware", "hardware", offered, name),)
    intro = note("Solid lines and points were measured. Dashed lines are forecasts of the cost formula.")
    try:
        compared, part = ([], _preset(PRESETS[name])) if name in PRESETS else _fitted(view)
    except ValueError as error:
        command = f"python jobs/benchmark.py --suite ring --out {view.folder}"
        missing = waiting(
            f"Nothing to fit the cost formula to ({error}); choose another hardware above, or run a ring", command
        )
        return Shown(section("forecast", "Scaling forecast", missing), None, control)
    return Shown(
        join(section("forecast", "Scaling forecast", intro), forecast_parts(view.page, compared, [part])), None, control
    )


def _preset(hardware: Hardware) -> tuple[Hardware, Sequence[Scaling]]:
    return hardware, preset_scalings(hardware, RANKS)


def _fitted(view: View) -> tuple[list[Compared], tuple[Hardware, Sequence[Scaling]]]:
    trials = [trial for trial in view.results.trials if trial.spec.task == "ring" and not trial.failed]
    rows = ring_rows(trial.record for trial in trials)
    hardware = fit_rows(rows, view.results.points(trials))
    alone = replace(hardware, devices=None, crowding=())  # in the forecast every rank has a core or GPU of its own
    return compare(rows, hardware), (alone, measured_scalings(rows, alone, RANKS))
