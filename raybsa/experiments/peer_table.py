"""The rows of the ``gpu`` suite as text: one line a cell, ours beside the ideal, FlexAttention and the best library.

python -m raybsa.experiments.peer_table results/gpu --only 'd128-32K'
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from raybsa.experiments.options import regex
from raybsa.experiments.peer_cells import cells
from raybsa.experiments.peer_rows import PASSES, Row, extra_bytes, held_bytes, pass_of, rows_of
from raybsa.printable import printable
from raybsa.results.store import Store

_PASS = f"{'ideal':>5} {'/flex':>5} {'/best':>10} {'auto':>4}"
_HOST = f"{'host ms':>9} {'mem':>5} {'err':>7}"
HEAD = f"{'cell':<26} {'kept':>6} | {'fwd ms':>7} {_PASS} | {'f+b ms':>7} {_PASS} | {_HOST}"
LEGEND = """\
ideal: dense cuDNN × kept / ours. /flex, /best: our time / theirs, below 1 is ours ahead. auto: its time / best's.
host: until a call returns, forward/forward + backward. mem: beyond inputs, output and gradients, of q+k+v+out.
err: forward/gradients, in errors of plain torch of the same dtype. Last: who refused (-) or failed (!)."""


def text_of(rows: Iterable[Row]) -> str:
    """The whole table, its head and what it means."""
    return "\n".join([HEAD, *map(line_of, rows), LEGEND])


def line_of(row: Row) -> str:
    """One cell in at most 150 characters."""
    own, record = row.own, next(iter(row.by_backend.values()))
    start = f"{row.name:<26} {_shown(row.density, '{:.2%}'):>6}"
    if own is None:
        said = row.by_backend.get(row.spec.layer(0).backend, record).error or "not measured"
        return f"{start} | {' '.join(said.split())}"[:150]
    host = f"{_shown(own.forward_host_ms, '{:.2f}')}/{_shown(own.forward_backward_host_ms, '{:.2f}')}"
    errors = (
        _ratio(own.error_forward, own.reference_error_forward),
        _ratio(own.error_gradient, own.reference_error_gradient),
    )
    memory = _ratio(extra_bytes(own, row.spec), held_bytes(row.spec))
    return (
        f"{start} | {' | '.join(_pass(row, name) for name in PASSES)} | {host:>9} "
        f"{_shown(memory, '{:.1%}'):>5} {'/'.join(_shown(e, '{:.1f}') for e in errors):>7}{_marks(row)}"
    )[:150]


def _pass(row: Row, name: str) -> str:
    """Times of one pass: ours, of ideal, against flex, against the best library by its name, and auto's."""
    found = pass_of(row, name)
    against_best = f"{_shown(found.over_best(found.own), '{:.2f}')} {found.best}" if found.best else "-"
    cells = [
        f"{_shown(found.own, '{:.3f}'):>7}",
        f"{_shown(_ratio(found.ideal, found.own), '{:.0%}'):>5}",
        f"{_shown(_ratio(found.own, found.peers.get('flex')), '{:.2f}'):>5}",
        f"{against_best:>10}",
        f"{_shown(found.over_best(found.auto), '{:.2f}'):>4}",
    ]
    return " ".join(cells)


def _marks(row: Row) -> str:
    marks = {"refused": "-", "failed": "!"}
    return "".join(f" {name}{marks[r.status]}" for name, r in row.by_backend.items() if r.status in marks)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def main() -> None:
    printable(sys.stdout)
    parser = argparse.ArgumentParser(
        prog="python -m raybsa.experiments.peer_table", description="Print measured cells."
    )
    parser.add_argument("results", metavar="RESULTS", help="folder or pyarrow.fs URI of --suite gpu")
    parser.add_argument("--only", type=regex, default="", metavar="REGEX", help="cells whose name it finds")
    options = parser.parse_args()
    try:
        rows = rows_of(Store(options.results).read_asked(), cells())
    except OSError as error:
        parser.error(str(error))
    found = [row for row in rows if options.only.search(row.name)]
    if not found:
        which = f" whose name {options.only.pattern!r} finds" if options.only.pattern else ""
        parser.error(f"rows of --suite gpu{which} were wanted under {options.results!r}, found none")
    print(text_of(found))


if __name__ == "__main__":
    main()
