"""Makes the table behind ``backend="auto"`` from a results folder of ``jobs/benchmark.py --suite gpu --peers``:

    python -m raybsa.experiments.auto_table results/gpu

Cells of a GPU that the folder does not have stay as they are; ``--out`` writes elsewhere than into the package.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from raybsa.experiments.peer_cells import Cell, cells
from raybsa.experiments.peer_rows import Row, rows_of
from raybsa.kernels.auto import skews
from raybsa.kernels.auto_table import OWN, PATH, PEERS, Measured, parse, text_of
from raybsa.printable import printable
from raybsa.results.record import Record
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from raybsa.tasks.peers import peer_layout


def table_rows(records: Iterable[Record], asked: Sequence[Cell]) -> list[Measured]:
    """Two rows (forward; forward and backward) for every cell in which ours and another library were measured.

    Raises:
        ValueError: there is no such cell.
    """
    by_device: dict[str, list[Record]] = {}
    for record in records:
        by_device.setdefault(record.device_name, []).append(record)
    found = [
        row
        for device in sorted(by_device)
        for cell in rows_of(by_device[device], asked)
        if cell.own is not None and cell.peers
        for row in _of_cell(cell)
    ]
    if not found:
        raise ValueError("a table needs measured rows of the gpu suite with --peers, found none")
    return found


def renewed(old: Iterable[Measured], new: Sequence[Measured]) -> list[Measured]:
    """The new rows, in the place of those of the same GPU, cell and pass; cells that the suite no longer has go."""
    asked = {cell.name for cell in cells() if cell.peers}
    rows = {(row.device, row.cell, row.backward): row for row in (*old, *new) if row.cell in asked}
    return sorted(rows.values(), key=lambda row: row.device)


def _of_cell(cell: Row) -> Iterator[Measured]:
    own, spec = cell.own, cell.spec
    assert own is not None
    assert own.density is not None
    contenders = {OWN: own, **{name: cell.peers[name] for name in PEERS if name in cell.peers}}
    row_skew, column_skew = _skews(spec)
    for backward, field in ((False, "forward_ms_p50"), (True, "forward_backward_ms_p50")):
        ms = {name: value for name, record in contenders.items() if (value := getattr(record, field))}
        if OWN in ms:
            yield Measured(
                capability=own.capability,
                device=own.device_name,
                dtype=spec.dtype,
                backward=backward,
                head_dim=spec.head_dim,
                block_size=spec.layer(0).block_size,
                heads=spec.batch * spec.num_heads,
                tokens=spec.seq_len,
                density=own.density,
                row_skew=row_skew,
                column_skew=column_skew,
                ms=ms,
                cell=cell.name,
                libraries=", ".join(dict.fromkeys(contenders[name].library for name in ms)),
            )


def _skews(spec: TrialSpec) -> tuple[float, float]:
    """Those of one head's layout: the heads of a cell are alike."""
    return skews(peer_layout(replace(spec, num_heads=1, num_kv_heads=None), torch.device("cpu")))


def main(arguments: Sequence[str] | None = None) -> int:
    printable(sys.stdout)
    parser = argparse.ArgumentParser(
        prog="python -m raybsa.experiments.auto_table",
        description="Make the measured table behind backend='auto' from rows of the gpu suite.",
    )
    parser.add_argument("results", metavar="RESULTS", help="folder or pyarrow.fs URI of --suite gpu --peers")
    parser.add_argument("--out", type=Path, default=PATH, help="the table to renew (default: the package's own)")
    options = parser.parse_args(arguments)
    try:
        new = table_rows(Store(options.results).read_asked(), cells())
        old = parse(options.out.read_text("utf-8")) if options.out.exists() else ()
        options.out.write_text(text_of(renewed(old, new)), "utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    taken = Counter((row.device, "forward + backward" if row.backward else "forward", row.order[0]) for row in new)
    for (device, name, backend), count in sorted(taken.items()):
        print(f"{device}, {name}: {backend} in {count} cells")
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
