"""The records of the ``gpu`` suite by cell: ours beside the ideal, the other libraries and what ``auto`` takes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from raybsa.experiments.peer_cells import Cell
from raybsa.kernels.auto_table import OWN, PEERS, of_device, table
from raybsa.results.record import Record
from raybsa.spec import TrialSpec, stable_hash

PASSES = ("forward", "forward_backward")
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Row:
    """One cell's records by backend."""

    name: str
    spec: TrialSpec
    by_backend: dict[str, Record]

    @property
    def own(self) -> Record | None:
        record = self.by_backend.get(self.spec.layer(0).backend)
        return record if record is not None and record.status == "ok" else None

    @property
    def peers(self) -> dict[str, Record]:
        return {name: r for name, r in self.by_backend.items() if name in PEERS and r.status == "ok"}

    @property
    def density(self) -> float | None:
        return next((r.density for r in self.by_backend.values() if r.density is not None), None)


class Pass(NamedTuple):
    """Milliseconds of one pass of a cell, None where not measured.

    ``ideal`` is dense cuDNN × density, ``best`` the fastest other library, ``auto`` what ``auto`` takes (its name is
    that of the backend, or ``auto`` where it was measured itself).
    """

    own: float | None
    ideal: float | None
    peers: dict[str, float]
    best: str | None
    auto: float | None
    auto_name: str

    def over_best(self, ms: float | None) -> float | None:
        """A time over the best other library's."""
        return ms / self.peers[self.best] if ms is not None and self.best else None


def rows_of(records: Iterable[Record], cells: Iterable[Cell]) -> list[Row]:
    """The cells that have rows, in the order of ``cells``."""
    found: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if record.task == "peers":
            found[_question(json.loads(record.spec))][record.backend] = record
    named = ((cell, found.get(_question(cell.spec.to_dict()))) for cell in cells)
    return [Row(cell.name, cell.spec, known) for cell, known in named if known]


def pass_of(row: Row, name: str) -> Pass:
    """The times of a pass (one of ``PASSES``) of a cell that was measured with our kernels."""
    own, field = row.own, f"{name}_ms_p50"
    if own is None:
        return Pass(None, None, {}, None, None, OWN)
    dense = getattr(own, f"dense_{field}")
    peers = {peer: ms for peer, record in row.peers.items() if (ms := getattr(record, field))}
    best = min(peers, key=lambda peer: peers[peer], default=None)
    ideal = dense * own.density if dense and own.density else None
    return Pass(getattr(own, field), ideal, peers, best, *_auto(row, own, name))


def held_bytes(spec: TrialSpec) -> int:
    """The bytes of q, k, v and the output: as much as the output and all gradients take."""
    heads = 2 * spec.num_heads + 2 * (spec.num_kv_heads or spec.num_heads)
    return ITEM_BYTES[spec.dtype] * spec.batch * spec.seq_len * spec.head_dim * heads


def extra_bytes(record: Record, spec: TrialSpec) -> int | None:
    """Peak memory of forward and backward beyond inputs, output and gradients; None where not measured."""
    trains = record.forward_backward_ms_p50 is not None
    return record.peak_bytes - held_bytes(spec) if record.peak_bytes is not None and trains else None


def _auto(row: Row, own: Record, name: str) -> tuple[float | None, str]:
    """What ``auto`` takes: as it was measured, else the time of the backend that the table has for this cell."""
    field, times = f"{name}_ms_p50", {OWN: own, **row.peers}
    measured = row.by_backend.get("auto")
    if measured is not None and measured.status == "ok":
        return getattr(measured, field), "auto"
    known = of_device(table(), own.capability, own.device_name)
    here = [line for line in known if line.cell == row.name and line.backward == (name == "forward_backward")]
    order = here[0].order if here else (OWN,)
    taken = next((backend for backend in order if backend in times and getattr(times[backend], field)), OWN)
    return getattr(times[taken], field), taken


def _question(spec: dict) -> str:
    """Equal for the rows of one cell: all but who computes it."""
    attention = [{key: value for key, value in layer.items() if key != "backend"} for layer in spec["attention"]]
    return stable_hash({**spec, "attention": attention})
