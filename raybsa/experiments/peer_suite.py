"""Runs the cells of the ``gpu`` suite: rows are written as they are measured, and a second run goes on where one ended.

Needs a GPU, and no Ray.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from raybsa.experiments.peer_cells import Cell
from raybsa.experiments.recording import Run, record_of, write
from raybsa.kernels.api import BACKENDS
from raybsa.kernels.auto_table import OWN, PEERS
from raybsa.kernels.peers import dense
from raybsa.kernels.peers.guards import installed
from raybsa.results.record import Measurement, Outcome, Record
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from raybsa.tasks.peers import (
    Answer,
    Inputs,
    Refused,
    dense_spec,
    measure_cell,
    measure_dense,
    of_backend,
    peer_inputs,
)
from raybsa.timing import device_name

LONGEST_DENSE = 1 << 17  # beyond it dense attention takes seconds a call
LONGEST_OTHER_DENSE = 1 << 15


class PeerSuite:
    """One run over cells, on one device.

    Args:
        cells: what to measure, in this order; neighbours of the same sizes share inputs and the dense line.
        peers: also other libraries, and ``auto`` where it takes one of them.
        time_budget_s: no cell is started when these seconds have passed; None is no bound.
        device: where to measure.
        repeats, budget_s: as in ``measure_cell``.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        store: Store,
        run: Run,
        *,
        peers: bool,
        time_budget_s: float | None = None,
        device: str = "cuda",
        repeats: int = 20,
        budget_s: float = 0.3,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("the gpu suite needs a CUDA device, this machine has none")
        self._cells, self._store, self._run, self._peers = cells, store, run, peers
        self._deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
        self._device = torch.device(device)
        self._timing: dict[str, Any] = {"repeats": repeats, "budget_s": budget_s}
        self._inputs: tuple[TrialSpec, Inputs, Measurement | None] | None = None
        self.left: list[Cell] = []

    def records(self) -> Iterator[tuple[Cell, list[Record]]]:
        """Every cell's rows as they are measured; ``left`` holds the cells that time did not suffice for.

        Raises:
            GpuLost: a kernel left the GPU unusable; the rows until then are written.
        """
        done = self._done()
        for number, cell in enumerate(self._cells):
            backends = self._backends(cell)
            if all(of_backend(cell.spec, name).digest in done for name in backends):
                continue
            if self._deadline is not None and time.monotonic() > self._deadline:
                self.left = list(self._cells[number:])
                return
            yield cell, [self._write(spec, answer) for spec, answer in self._measured(cell, backends)]
            self._clear()

    def _measured(self, cell: Cell, backends: Sequence[str]) -> Iterator[tuple[TrialSpec, Answer]]:
        sizes = _sizes(cell.spec)
        if self._inputs is None or self._inputs[0] != sizes:
            self._inputs = None
            self._clear()
            inputs, ideal = peer_inputs(cell.spec, self._device), None
            for name, answer in self._dense(cell.spec, inputs):
                yield dense_spec(cell.spec, name), answer
                if name == dense.IDEAL and isinstance(answer, Measurement):
                    ideal = answer
            self._inputs = (sizes, inputs, ideal)
        _, inputs, ideal = self._inputs
        asked = [*backends, "auto"] if self._peers and cell.peers else backends
        yield from measure_cell(cell.spec, asked, inputs, ideal, **self._timing)

    def _dense(self, spec: TrialSpec, inputs: Inputs) -> Iterator[tuple[str, Answer]]:
        """The dense lines of these sizes, as far as they end in a bearable time."""
        for name in dense.LINES:
            longest = LONGEST_DENSE if name == dense.IDEAL else LONGEST_OTHER_DENSE if self._peers else 0
            if spec.seq_len <= longest:
                try:
                    yield name, measure_dense(spec, name, inputs, **self._timing)
                except RuntimeError as error:
                    yield name, f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"

    def _backends(self, cell: Cell) -> list[str]:
        """Ours, and the libraries that are installed here."""
        others = [name for name in PEERS if installed_here(name)] if self._peers and cell.peers else []
        return [cell.spec.layer(0).backend, *others]

    def _done(self) -> set[str]:
        """Digests of the questions that were answered on such a device before, whatever the answer was."""
        here = device_name(self._device)
        rows = [r for r in self._store.read_records() if r.task == "peers" and r.device_name == here]
        return {row.spec_hash for row in rows}

    def _write(self, spec: TrialSpec, answer: Answer) -> Record:
        measured = answer if isinstance(answer, Measurement) else Measurement(device_name=device_name(self._device))
        error = None if isinstance(answer, Measurement) else str(answer)
        outcome = Outcome(spec, measured, error, 0)
        place = re.sub(r"[^A-Za-z0-9]+", "-", device_name(self._device))
        record = record_of(outcome, self._run, f"peers-{spec.digest}-{place}")
        if isinstance(answer, Refused):
            record = replace(record, status="refused")
        write(self._store, record, outcome)
        return record

    def _clear(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def installed_here(backend: str) -> bool:
    """Whether the package of a backend is there; what it refuses beyond that is a row."""
    package = getattr(BACKENDS[backend], "PACKAGE", None)
    return package is None or installed(package) is not None


def _sizes(spec: TrialSpec) -> TrialSpec:
    """Equal for cells that share inputs and dense attention."""
    return dense_spec(spec, OWN)
