"""The rows of the ``scaling`` suite as a short table: a line a question, our ring beside those that answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from raybsa.experiments.scaling_cells import DENSE, LONGEST, OWN, Cell, short
from raybsa.results.record import Record, efficiencies
from raybsa.tasks.ring_peers import FLASH

HEAD = (
    f"{'scaling':<7} {'tokens':>7} {'asked':>6} {'ranks':>5} | {'fwd ms':>9} {'eff.':>5} | {'f+b ms':>9} {'eff.':>5} | "
    f"{'MiB sent':>8} {'/need':>5} | {'x flash':>13} | others' time / ours, fwd f+b"
)
LEGEND = """\
eff.: one process's time / (ranks x the ring's), same kernel, same run. MiB: K and V of a forward, / what was needed.
x flash: the time of torch's dense flash attention on one device / the ring's, forward and forward + backward."""
Rows = Iterable[tuple[Cell, Record]]


def text_of(rows: Rows) -> str:
    """The whole table; below it whoever did not answer, and why, each reason once."""
    rows = list(rows)
    flash = {cell.spec.seq_len: record for cell, record in rows if cell.backend == FLASH and record.status == "ok"}
    others: dict[tuple[str, int, float, int], dict[str, Record]] = defaultdict(dict)
    for cell, record in rows:
        if cell.backend not in (OWN, FLASH) and record.status == "ok":
            others[_question(cell)][cell.backend] = record
    own = [(c, r) for c, r in rows if c.backend == OWN and c.scaling != LONGEST]
    lines = [_line(c, r, others[_question(c)], flash.get(c.spec.seq_len)) for c, r in sorted(own, key=_order)]
    return "\n".join([HEAD, *lines, LEGEND, *_silent(rows), *_longest(rows)])


def line_of(cell: Cell, record: Record) -> str:
    """One row as it comes, in at most 150 characters."""
    if record.error is not None:
        return f"{cell.name}: {record.status}: {' '.join(record.error.split())}"[:150]
    forward, both = (_shown(ms, "{:.2f}") for ms in (record.forward_ms_p50, record.forward_backward_ms_p50))
    errors = f"{_shown(record.error_forward, '{:.0e}')}, {_shown(record.error_gradient, '{:.0e}')}"
    return f"{cell.name}: {forward}, {both} ms; errors {errors}"


def _line(cell: Cell, record: Record, others: dict[str, Record], flash: Record | None) -> str:
    start = f"{cell.scaling:<7} {short(record.seq_len):>7} {_asked(cell):>6} {cell.world_size:>5} | "
    if record.status != "ok":
        return f"{start}{record.status}: {' '.join((record.error or '').split())}"[:150]
    shares, sent, needed = efficiencies(record), record.wire_forward_bytes or 0, record.needed_forward_bytes
    passes = [f"{_shown(_times(record)[i], '{:.2f}'):>9} {_shown(shares[i], '{:.0%}'):>5}" for i in range(2)]
    wire = f"{sent / 2**20:>8.1f} {_shown(sent / needed if needed else None, '{:.3f}'):>5}"
    beside = " ".join(f"{name} {_ratios(other, record)}" for name, other in others.items())
    ahead = _ratios(flash, record) if flash else "-"
    return f"{start}{' | '.join([*passes, wire])} | {ahead:>13} | {beside or '-'}"


def _silent(rows: Rows) -> list[str]:
    """Why others did not answer: for each of them and reason, on how many ranks."""
    reasons: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for cell, record in rows:
        if record.error is not None and cell.backend != OWN:
            reasons[cell.backend, record.status, " ".join(record.error.split())[:100]].append(cell.world_size)
    said = (
        f"{name} {status} on {', '.join(map(str, sorted(set(worlds))))}: {why}"
        for (name, status, why), worlds in reasons.items()
    )
    return list(said)


def _longest(rows: Rows) -> list[str]:
    tried = [(cell, record) for cell, record in rows if cell.scaling == LONGEST]
    fit = [record for _, record in tried if record.status == "ok"]
    if fit:
        best = max(fit, key=lambda record: record.seq_len)
        over = [c.spec.seq_len for c, r in tried if r.status == "failed"]
        least = f", {short(min(over))} did not" if over else ""
        ms = _shown(best.forward_backward_ms_p50, "{:.0f}")
        return [f"longest: {short(best.seq_len)} tokens at 1 % on {best.world_size}, f+b {ms} ms{least}"]
    return [f"longest: none, {record.error}" for _, record in tried[-1:]]


def _times(record: Record) -> tuple[float | None, float | None]:
    return record.forward_ms_p50, record.forward_backward_ms_p50


def _ratios(other: Record, own: Record) -> str:
    pairs = zip(_times(other), _times(own), strict=True)
    return " ".join(_shown(theirs / ours if theirs and ours else None, "{:.2f}") for theirs, ours in pairs)


def _question(cell: Cell) -> tuple[str, int, float, int]:
    return cell.scaling, cell.spec.seq_len, cell.density, cell.world_size


def _order(row: tuple[Cell, Record]) -> tuple[str, float, int]:
    cell = row[0]
    return cell.scaling, cell.density, cell.world_size


def _asked(cell: Cell) -> str:
    return "dense" if cell.density == DENSE else f"{cell.density:.0%}"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
