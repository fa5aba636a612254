"""The measured table behind ``backend="auto"``: a row a cell of the ``gpu`` suite and pass, kept as ``auto_table.csv``.

The file is data: ``python -m raybsa.experiments.auto_table RESULTS`` makes it again from measured rows.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

OWN = "triton"
PEERS = ("flex", "fa4", "cudnn")
MUST_GAIN = 1.02  # a library is taken where our kernels need more than this many times its time
PASSES = {"forward": False, "forward+backward": True}
PATH = Path(__file__).with_name("auto_table.csv")
COLUMNS = (
    *("capability", "device", "dtype", "pass", "head_dim", "block_size", "heads", "tokens"),
    *("density", "row_skew", "column_skew", "fastest", "ahead", OWN, *PEERS, "cell", "libraries"),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One cell's times in one pass.

    Args:
        capability, device: the GPU's architecture (``"sm_90"``) and name.
        dtype: of q, k and v (``"bfloat16"``).
        backward: whether the times are those of forward and backward, else of the forward alone.
        heads: batch × heads, each with ``tokens`` queries and as many keys of ``head_dim``.
        density: kept share of the blocks of ``block_size`` × ``block_size``.
        row_skew, column_skew: the longest row (column) of blocks over the mean.
        ms: milliseconds of every backend that was measured and right, ours among them.
        cell: the suite's name of it.
        libraries: what was measured, with versions.
    """

    capability: str
    device: str
    dtype: str
    backward: bool
    head_dim: int
    block_size: int
    heads: int
    tokens: int
    density: float
    row_skew: float
    column_skew: float
    ms: dict[str, float]
    cell: str
    libraries: str

    @property
    def order(self) -> tuple[str, ...]:
        """The backends, the one to take first: our own unless another is ahead by more than ``MUST_GAIN``."""

        def counted(name: str) -> tuple[float, bool]:
            return (self.ms[name] / MUST_GAIN, False) if name == OWN else (self.ms[name], True)

        return tuple(sorted(self.ms, key=counted))

    @property
    def ahead(self) -> float | None:
        """The best other backend's time over that of the one to take; None without another."""
        first, *others = self.order
        return min(self.ms[name] for name in others) / self.ms[first] if others else None


def family(device: str) -> str:
    """``"H100"`` of ``"NVIDIA H100 80GB HBM3"``: the first word with a number in it, else the whole name."""
    found = re.search(r"\b[A-Za-z]*\d+[A-Za-z]*", device)
    return found[0] if found else device


@cache
def table() -> tuple[Measured, ...]:
    """The rows that came with the package."""
    return parse(PATH.read_text("utf-8"))


def of_device(rows: Iterable[Measured], capability: str, device: str) -> tuple[Measured, ...]:
    """The rows of this GPU's architecture: those of its own family (``family``) alone where there are any."""
    alike = tuple(row for row in rows if row.capability == capability)
    return tuple(row for row in alike if family(row.device) == family(device)) or alike


def parse(text: str) -> tuple[Measured, ...]:
    """The rows of a table's text. Raises ValueError for other columns or a value that cannot be read."""
    lines = csv.DictReader(io.StringIO(text))
    if tuple(lines.fieldnames or ()) != COLUMNS:
        raise ValueError(f"the table's columns must be {COLUMNS}, got {lines.fieldnames}")
    return tuple(map(_row, lines))


def text_of(rows: Iterable[Measured]) -> str:
    """The rows as ``parse`` reads them; times and skews to four digits."""
    out = io.StringIO()
    lines = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    lines.writeheader()
    lines.writerows(map(_line, rows))
    return out.getvalue()


def _row(line: dict[str, str]) -> Measured:
    if line["pass"] not in PASSES:
        raise ValueError(f"a pass is one of {sorted(PASSES)}, got {line['pass']!r}")
    return Measured(
        capability=line["capability"],
        device=line["device"],
        dtype=line["dtype"],
        backward=PASSES[line["pass"]],
        head_dim=int(line["head_dim"]),
        block_size=int(line["block_size"]),
        heads=int(line["heads"]),
        tokens=int(line["tokens"]),
        density=float(line["density"]),
        row_skew=float(line["row_skew"]),
        column_skew=float(line["column_skew"]),
        ms={name: float(line[name]) for name in (OWN, *PEERS) if line[name]},
        cell=line["cell"],
        libraries=line["libraries"],
    )


def _line(row: Measured) -> dict[str, str]:
    row = replace(row, ms={name: float(f"{value:.4g}") for name, value in row.ms.items()})
    numbers = {"density": row.density, "row_skew": row.row_skew, "column_skew": row.column_skew, **row.ms}
    return {
        **{name: str(getattr(row, name)) for name in ("capability", "device", "dtype", "cell", "libraries")},
        **{name: str(getattr(row, name)) for name in ("head_dim", "block_size", "heads", "tokens")},
        **{name: f"{value:.4g}" for name, value in numbers.items()},
        "pass": next(name for name, backward in PASSES.items() if backward == row.backward),
        "fastest": row.order[0],
        "ahead": "" if row.ahead is None else f"{row.ahead:.2f}",
    }
