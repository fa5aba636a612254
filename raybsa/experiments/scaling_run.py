"""The ``scaling`` suite from the first rank to the last word: cells, longest sequence, recovery, forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raybsa.experiments.forecast import (
    Compared,
    RingRow,
    compare,
    fit_rows,
    median_error_line,
    prediction_points,
    ring_rows,
)
from raybsa.experiments.recording import Run
from raybsa.experiments.scaling_cells import LONGEST, QUICK, SIZES, Cell, worlds_of
from raybsa.experiments.scaling_longest import try_lengths
from raybsa.experiments.scaling_recovery import kill_and_recover
from raybsa.experiments.scaling_suite import ScalingSuite
from raybsa.experiments.scaling_table import line_of, text_of
from raybsa.results.record import Record
from raybsa.results.store import Store
from raybsa.ring.hardware import Hardware
from raybsa.tasks.ring_rank import devices_of
from raybsa.tasks.ring_ranks import default_device

LIMIT_S = 420.0  # with a last cell that takes longer than told still under eight minutes
CELLS_SHARE, LONGEST_SHARE = 0.75, 0.12  # of the time; the rest is for the recovery and what is drawn


@dataclass(frozen=True)
class Scaled:
    """What one run found.

    Args:
        rows: every cell's record.
        words: the table and what else was found, as text.
        hardware: fitted to the rows of our ring; None where there were none.
        compared: those rows beside the formula's predictions.
    """

    rows: Sequence[tuple[Cell, Record]]
    words: str
    hardware: Hardware | None
    compared: Sequence[Compared]

    @property
    def good(self) -> bool:
        """Whether nothing failed but lengths that were tried to see whether they fit."""
        return all(record.status != "failed" for cell, record in self.rows if cell.scaling != LONGEST)

    @property
    def ring_rows(self) -> list[RingRow]:
        return [compared.row for compared in self.compared]


def measure_scaling(
    store: Store, git_commit: str, *, quick: bool, limit_s: float, repeats: int, budget_s: float, say: Callable
) -> Scaled:
    """All of the suite on the GPUs of this host, or on its cores where it has none.

    Args:
        limit_s: of everything together, roughly; what is left out for it is named.
        say: told a line for each row as it comes.
    """
    device, run = default_device(), Run.start("benchmark", git_commit)
    sizes, worlds = (QUICK if quick else SIZES)[device], worlds_of(devices_of(device))
    cells_s = CELLS_SHARE * limit_s
    suite = ScalingSuite(sizes, worlds, device, store, run, time_budget_s=cells_s, repeats=repeats, budget_s=budget_s)
    rows = []
    for cell, record in suite.records():
        rows.append((cell, record))
        say(line_of(cell, record))
    records = [record for _, record in rows]
    rows += try_lengths(suite, sizes, records, max(worlds), device, LONGEST_SHARE * limit_s)
    recovery = kill_and_recover(store, Run.start("benchmark", git_commit), devices_of("cuda"))
    hardware, compared, error = _told(store, records)
    words = [text_of(rows), recovery, f"forecast: {error}"]
    if suite.left:
        words.append(f"left out, {limit_s:.0f} s were too few: {'; '.join(cell.name for cell in suite.left)}")
    return Scaled(rows, "\n".join(words), hardware, compared)


def _told(store: Store, records: Sequence[Record]) -> tuple[Hardware | None, list[Compared], str]:
    """What the cost formula, fitted to these rows, tells of each; kept as series beside them. And its error."""
    rows = ring_rows(records)
    try:
        hardware = fit_rows(rows, store.read_series())
    except ValueError as error:
        return None, [], f"none, {error}"
    compared = compare(rows, hardware)
    for row in compared:
        store.write_series(prediction_points(row))
    return hardware, compared, median_error_line(compared)
