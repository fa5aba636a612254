"""Runs the cells of the ``scaling`` suite on the ranks of this host; rows are written as they come. Needs no Ray.

Every number of ranks has an even share of the time that is left when its turn comes. A cell that would not end in it is
left out and named; since each list begins with what matters most, so is what is measured. A library that failed once at
a number of ranks is not asked again there: its ranks had to be ended and started anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from raybsa.experiments.recording import Run, record_of, write
from raybsa.experiments.scaling_cells import OWN, Cell, Sizes, cells
from raybsa.results.record import Measurement, Outcome, Record
from raybsa.results.store import Store
from raybsa.ring.timeline import Point
from raybsa.tasks.peers import Answer, Refused
from raybsa.tasks.ring import RING_PEERS
from raybsa.tasks.ring_peers import why_not
from raybsa.tasks.ring_rank import joined, place_of
from raybsa.tasks.ring_ranks import RANK_ERRORS, ProcessRing, said_by
from raybsa.timing import device_name

GRACE_S = 60.0  # beyond three times its estimate, or beyond the budget, a cell's ranks are ended


class ScalingSuite:
    """One run over all numbers of ranks.

    Args:
        sizes: how large the questions are.
        worlds: numbers of ranks, in the order in which they are measured.
        device: ``"cpu"`` or ``"cuda"``.
        store, run: where rows go.
        time_budget_s: of all cells together.
        repeats, budget_s: of each cell, as in ``measure_rank``.

    Attributes:
        left: the cells that time did not suffice for.
    """

    def __init__(
        self,
        sizes: Sizes,
        worlds: Sequence[int],
        device: str,
        store: Store,
        run: Run,
        *,
        time_budget_s: float,
        repeats: int = 20,
        budget_s: float = 3.0,
    ) -> None:
        self._sizes, self._worlds, self._device = sizes, worlds, device
        self._store, self._run, self._written = store, run, 0
        self._end = time.monotonic() + time_budget_s
        self._timing = (repeats, budget_s)
        self.left: list[Cell] = []

    def records(self) -> Iterator[tuple[Cell, Record]]:
        """Every cell's row as it is measured."""
        for turn, world_size in enumerate(self._worlds):
            now = time.monotonic()
            share = (self._end - now) / (len(self._worlds) - turn)
            yield from self._of_world(world_size, now + share)

    def attempt(self, cell: Cell, limit_s: float) -> Record:
        """The row of a cell that may well fail, on ranks of its own."""
        try:
            with ProcessRing(cell.world_size, self._device) as ring:
                reports = ring.ask("measure", cell.spec, *self._timing, limit_s=limit_s)
            return self.write(cell, joined(cell.spec, reports, self._device, ring.devices, ()))
        except RANK_ERRORS as error:
            return self.write(cell, said_by(error))

    def write(self, cell: Cell, answer: Answer) -> Record:
        """The row of an answer."""
        name = device_name(place_of(self._device))
        unmeasured = Measurement(device=self._device, device_name=name, world_size=cell.world_size)
        measured, error = (answer, None) if isinstance(answer, Measurement) else (unmeasured, str(answer))
        outcome = Outcome(cell.spec, measured, error, 0)
        record = record_of(outcome, self._run, self._run.trial_id(self._written))
        if isinstance(answer, Refused):
            record = replace(record, status="refused")
        write(self._store, record, outcome)
        self._written += 1
        return record

    def _of_world(self, world_size: int, deadline: float) -> Iterator[tuple[Cell, Record]]:
        waiting: deque[Cell] = deque()
        for cell in cells(self._sizes, world_size, self._device, self._worlds):
            refusal = why_not(cell.spec, self._device) if cell.spec.task == RING_PEERS else None
            if refusal is None:
                waiting.append(cell)
            else:
                yield cell, self.write(cell, Refused(refusal))
        broken: dict[str, str] = {}
        calibration: list[Point] = []
        while waiting:
            try:
                with ProcessRing(world_size, self._device) as ring:
                    calibration = calibration or self._ask(ring, "calibrate", waiting[0])[0]
                    while waiting:
                        cell = waiting[0]
                        if cell.backend in broken:
                            yield cell, self.write(waiting.popleft(), f"failed before: {broken[cell.backend]}")
                        elif time.monotonic() + cell.seconds > deadline:
                            self.left.append(waiting.popleft())
                        else:
                            reports = self._ask(ring, "measure", cell, *self._timing)
                            answer = joined(cell.spec, reports, self._device, ring.devices, calibration)
                            yield waiting.popleft(), self.write(cell, answer)
            except RANK_ERRORS as error:
                cell = waiting.popleft()
                if cell.backend != OWN:
                    broken[cell.backend] = said_by(error)
                yield cell, self.write(cell, said_by(error))

    def _ask(self, ring: ProcessRing, method: str, cell: Cell, *arguments: float) -> list:
        limit_s = max(GRACE_S, min(GRACE_S + 3 * cell.seconds, self._end + GRACE_S - time.monotonic()))
        return ring.ask(method, cell.spec, *arguments, limit_s=limit_s)
