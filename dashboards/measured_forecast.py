"""The forecast's page of rings that were measured, as a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dashboards.forecast import forecast_page
from dashboards.scalings import Scaling, measured_scalings
from dashboards.written import write_page
from raybsa.experiments.forecast import Compared, RingRow
from raybsa.ring.hardware import Hardware

Part = tuple[Hardware, Sequence[Scaling]]


def measured_part(rows: Sequence[RingRow], hardware: Hardware, most: int) -> Part:
    """The hardware that was fitted to the rows, and their scalings up to ``most`` ranks, each with a core or GPU of
    its own."""
    own = replace(hardware, devices=None, crowding=())
    return own, measured_scalings(rows, own, most)


def write_forecast(path: str, compared: Sequence[Compared], parts: Sequence[Part]) -> None:
    """Writes the page. Raises OSError where it cannot be written: there is somebody else's file."""
    write_page(forecast_page(compared, parts), path)
