"""The rows of the ``gpu`` suite as text: one line a cell, ours beside the ideal, FlexAttention and the best library."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from raybsa.experiments.peer_cells import Cell
from raybsa.kernels.auto_table import OWN, PEERS, of_device, table
from raybsa.results.record import Record
from raybsa.spec import TrialSpec, stable_hash

_PASS = f"{'ideal':>5} {'/flex':>5} {'/best':>10} {'auto':>4}"
_HOST = f"{'host ms':>9} {'mem':>5} {'err':>7}"
HEAD = f"{'cell':<26} {'kept':>6} | {'fwd ms':>7} {_PASS} | {'f+b ms':>7} {_PASS} | {_HOST}"
LEGEND = """\
ideal: dense cuDNN × kept / ours. /flex, /best: our time / theirs, below 1 is ours ahead. auto: its time / best's.
host: until a call returns, forward/forward + backward. mem: beyond inputs, output and gradients, of q+k+v+out.
err: forward/gradients, in errors of plain torch of the same dtype. Last: who refused (-) or failed (!)."""


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


def rows_of(records: Iterable[Record], cells: Iterable[Cell]) -> list[Row]:
    """The cells that have rows, in the order of ``cells``."""
    found: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        if record.task == "peers":
            found[_question(json.loads(record.spec))][record.backend] = record
    named = ((cell, found.get(_question(cell.spec.to_dict()))) for cell in cells)
    return [Row(cell.name, cell.spec, known) for cell, known in named if known]


def line_of(row: Row) -> str:
    """One cell in at most 150 characters."""
    own, record = row.own, next(iter(row.by_backend.values()))
    kept = next((r.density for r in row.by_backend.values() if r.density is not None), None)
    start = f"{row.name:<26} {_shown(kept, '{:.2%}'):>6}"
    if own is None:
        said = row.by_backend.get(row.spec.layer(0).backend, record).error or "not measured"
        return f"{start} | {' '.join(said.split())}"[:150]
    host = f"{_shown(own.forward_host_ms, '{:.2f}')}/{_shown(own.forward_backward_host_ms, '{:.2f}')}"
    errors = (
        _ratio(own.error_forward, own.reference_error_forward),
        _ratio(own.error_gradient, own.reference_error_gradient),
    )
    return (
        f"{start} | {_pass(row, own, 'forward')} | {_pass(row, own, 'forward_backward')} | {host:>9} "
        f"{_shown(_extra(row, own), '{:.1%}'):>5} {'/'.join(_shown(e, '{:.1f}') for e in errors):>7}{_marks(row)}"
    )[:150]


def _pass(row: Row, own: Record, name: str) -> str:
    """Times of one pass: ours, of ideal, against flex, against the best library by its name, and auto's."""
    field = f"{name}_ms_p50"
    ours, dense = getattr(own, field), getattr(own, f"dense_{field}")
    theirs = {peer: getattr(r, field) for peer, r in row.peers.items() if getattr(r, field)}
    best = min(theirs, key=lambda peer: theirs[peer], default=None)
    against_best = f"{_shown(_ratio(ours, theirs[best]), '{:.2f}')} {best}" if best else "-"
    share = dense * own.density / ours if ours and dense and own.density else None
    auto = _ratio(_auto_ms(row, own, name), theirs[best]) if best else None
    cells = [
        f"{_shown(ours, '{:.3f}'):>7}",
        f"{_shown(share, '{:.0%}'):>5}",
        f"{_shown(_ratio(ours, theirs.get('flex')), '{:.2f}'):>5}",
        f"{against_best:>10}",
        f"{_shown(auto, '{:.2f}'):>4}",
    ]
    return " ".join(cells)


def _auto_ms(row: Row, own: Record, name: str) -> float | None:
    """What ``auto`` takes: as it was measured, else the time of the backend that the table has for this cell."""
    field, times = f"{name}_ms_p50", {OWN: own, **row.peers}
    if (measured := row.by_backend.get("auto")) is not None and measured.status == "ok":
        return getattr(measured, field)
    known = of_device(table(), own.capability, own.device_name)
    here = [line for line in known if line.cell == row.name and line.backward == (name == "forward_backward")]
    order = here[0].order if here else (OWN,)
    return next((getattr(times[backend], field) for backend in order if backend in times), None)


def _extra(row: Row, own: Record) -> float | None:
    """Peak memory beyond output and gradients, as a share of q, k, v and the output."""
    spec = row.spec
    kv_heads = spec.num_kv_heads or spec.num_heads
    held = (
        2 * spec.batch * spec.seq_len * spec.head_dim * (2 * spec.num_heads + 2 * kv_heads)
    )  # as much as out and grads
    return (own.peak_bytes - held) / held if own.peak_bytes is not None else None


def _marks(row: Row) -> str:
    marks = {"refused": "-", "failed": "!"}
    return "".join(f" {name}{marks[r.status]}" for name, r in row.by_backend.items() if r.status in marks)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _question(spec: dict) -> str:
    """Equal for the rows of one cell: all but who computes it."""
    attention = [{key: value for key, value in layer.items() if key != "backend"} for layer in spec["attention"]]
    return stable_hash({**spec, "attention": attention})
