"""Filters: what can be chosen among the rows at hand, and the rows that remain."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dashboards.app.address import FILTERS, Address
from dashboards.frames import Results, Trial
from dashboards.theme import DENSITY_LABELS, density_class
from dashboards.wording import cut


class Option(NamedTuple):
    """A value of a filter, and how it reads."""

    value: str
    label: str


_READ: dict[str, Callable[[Trial], str]] = {
    "run": lambda trial: trial.record.run_id or "",
    "pattern": lambda trial: trial.record.pattern or "",
    "device": lambda trial: trial.record.device_name or trial.record.device or "",
    "density": lambda trial: str(density_class(trial.density)),
}


_DENSITIES = {str(index): label for index, label in enumerate(DENSITY_LABELS)}


def options(results: Results, address: Address) -> dict[str, list[Option]]:
    """The values that occur and those that are chosen, whose rows may be still to come, by filter; densities the
    sparsest first, all else by name."""
    found = {
        name: sorted({*map(read, results.trials), *address.chosen.get(name, ())} - {""}) for name, read in _READ.items()
    }
    return {name: [Option(value, _label(name, value)) for value in found[name]] for name in FILTERS}


def told(address: Address) -> str:
    """The filters in words."""
    labels = {name: [_label(name, value) for value in values] for name, values in address.filters.chosen.items()}
    return "; ".join(f"{name} {' or '.join(values)}" for name, values in labels.items())


def _label(name: str, value: str) -> str:
    return _DENSITIES.get(value, value) if name == "density" else cut(value)


def filtered(results: Results, address: Address) -> Results:
    """The trials that have one of the chosen values of every filter."""
    asked = [(_READ[name], set(address.chosen[name])) for name in FILTERS if name in address.chosen]
    if not asked:
        return results
    kept = (trial for trial in results.trials if all(read(trial) in values for read, values in asked))
    return Results(tuple(kept), results.series)
