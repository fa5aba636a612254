"""Scaling forecast: the cost formula fitted to the rows at hand, or a published machine's, over many ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from dashboards.app.filters import Option
from dashboards.app.view import Control, Shown, View, waiting
from dashboards.forecast import forecast_parts
from dashboards.frames import Trial
from dashboards.markup import Markup, join
from dashboards.scalings import Scaling, measured_scalings, preset_scalings
from dashboards.sections.frame import note, section
from raybsa.experiments.forecast import Compared, compare, fit_rows, ring_rows
from raybsa.results.record import SeriesPoint
from raybsa.ring.hardware import PRESETS, Hardware

TITLE = "Forecast"
RANKS = ("128", "256", "1024")  # forecast up to so many; the last takes seconds
_HERE = "here"


def show(view: View) -> Shown:
    here = [Option(_HERE, "fitted to the rows here")]
    hardware = [*here, *(Option(name, PRESETS[name].label) for name in sorted(PRESETS))]
    name, ranks = (view.address.one(choice) or "" for choice in ("hardware", "ranks"))
    name, ranks = name if name in PRESETS else _HERE, ranks if ranks in RANKS else RANKS[0]
    controls = (
        Control("hardware", "hardware", hardware, name),
        Control("ranks", "up to how many ranks", [Option(n, n) for n in RANKS], ranks),
    )
    return Shown(_content(view, name, int(ranks)), None, controls)


def _content(view: View, name: str, most: int) -> Markup:
    trials = tuple(trial for trial in view.results.trials if trial.spec.task == "ring" and not trial.failed)
    try:
        if name in PRESETS:
            compared, part = _preset(name, most)
        else:
            compared, part = _fitted(trials, tuple(view.results.points(trials)), most)
    except ValueError as error:
        command = f"python jobs/benchmark.py --suite ring --out {view.folder}"
        missing = waiting(
            view, f"No rows to fit the cost formula to ({error}); other hardware can be chosen above", command
        )
        return section("forecast", "Scaling forecast", missing)
    told = note("Solid lines and points were measured. Dashed lines are forecasts of the cost formula.")
    return join(section("forecast", "Scaling forecast", told), forecast_parts(view.page, compared, [part]))


@lru_cache(maxsize=8)
def _preset(name: str, most: int) -> tuple[list[Compared], tuple[Hardware, Sequence[Scaling]]]:
    """A published machine has no rows."""
    return [], (PRESETS[name], preset_scalings(PRESETS[name], most))


@lru_cache(maxsize=8)
def _fitted(
    trials: tuple[Trial, ...], series: tuple[SeriesPoint, ...], most: int
) -> tuple[list[Compared], tuple[Hardware, Sequence[Scaling]]]:
    """Rows beside their predictions, and what follows from the hardware that they were fitted to."""
    rows = ring_rows(trial.record for trial in trials)
    hardware = fit_rows(rows, series)
    alone = replace(hardware, devices=None, crowding=())  # in the forecast every rank has a core or GPU of its own
    return compare(rows, hardware), (alone, measured_scalings(rows, alone, most))
