"""From measured ring rows to what a forecast's page shows of them: fitted hardware, errors, and scalings beyond."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dashboards.forecast import forecast_page
from dashboards.scalings import Scaling, measured_scalings
from raybsa.experiments.forecast import Compared, compare, fit_rows, ring_rows
from raybsa.results.record import Record, SeriesPoint
from raybsa.ring.hardware import Hardware

Part = tuple[Hardware, Sequence[Scaling]]


def measured_forecast(
    records: Iterable[Record], series: Iterable[SeriesPoint], most: int
) -> tuple[list[Compared], Part]:
    """Every row beside its prediction, and the hardware that was fitted with its scalings up to ``most`` ranks.

    Raises:
        ValueError: no rows of a ring, or rows of several devices.
    """
    rows = ring_rows(records)
    hardware = fit_rows(rows, series)
    own = replace(hardware, devices=None, crowding=())  # in the forecast every rank has a core or GPU of its own
    return compare(rows, hardware), (own, measured_scalings(rows, own, most))


def write_forecast(path: str, compared: Sequence[Compared], parts: Sequence[Part]) -> None:
    """The page as a file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(forecast_page(compared, parts))
