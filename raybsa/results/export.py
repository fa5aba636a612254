"""Records for other tools: one CSV table, or a TensorBoard log with a run a trial."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from raybsa.results.record import Measured, Record, SeriesPoint
from raybsa.results.roots import one_name
from raybsa.results.whole import write_whole

_EVENTS = "events.out.tfevents.0.raybsa"  # TensorBoard draws every file of a run, so there is one
_HPARAMS = ("task", "variant", "pattern", "block_size", "seq_len", "train_len", "seed", "status")


def write_csv(records: Sequence[Record], path: str) -> None:
    """One row a record, one column a field; empty where nothing was measured.

    Raises:
        FileExistsError: there is a file that is no such table.
    """
    if os.path.lexists(path) and not _is_ours(path):
        raise FileExistsError(f"{path} is no table that raybsa exported, so it stays: name another file with --csv")
    columns = {field.name: [getattr(record, field.name) for record in records] for field in fields(Record)}
    buffer = io.BytesIO()
    csv.write_csv(pa.table(columns), buffer)
    write_whole(os.path.abspath(path), buffer.getvalue())


def _is_ours(path: str) -> bool:
    """Whether a file begins with the head that our tables have."""
    head = ",".join(f'"{field.name}"' for field in fields(Record)).encode()
    with open(path, "rb") as file:
        return file.readline().rstrip(b"\r\n") == head


def write_tensorboard(records: Sequence[Record], series: Iterable[SeriesPoint], folder: str) -> None:
    """A run a trial: its curves as scalars, its question as hyperparameters beside all numbers that it measured.

    Written again, a run takes the place of what this wrote before. A name of a row that is no name of a folder is
    quoted: all is written within ``folder``.

    Raises:
        OSError: it cannot be written.
        ImportError: tensorboardX is missing; the message names the command that installs it.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard logs need tensorboardX: pip install tensorboardX") from error
    curves: dict[str, list[SeriesPoint]] = {record.trial_id: [] for record in records}
    for point in series:
        curves.get(point.trial_id, []).append(point)
    for record in records:
        numbers = {k: float(v) for k in asdict(Measured()) if isinstance(v := getattr(record, k), int | float)}
        asked = {name: value for name in _HPARAMS if (value := getattr(record, name)) is not None}
        with tempfile.TemporaryDirectory() as made:
            with SummaryWriter(made) as writer:
                for point in curves[record.trial_id]:
                    tag = f"{point.name}/rank{point.rank}" if point.rank else point.name
                    writer.add_scalar(tag, point.value, point.step)
                writer.add_hparams(asked, numbers, name="hparams")
            _take_over(Path(made), Path(folder, one_name(record.trial_id)))


def _take_over(made: Path, run: Path) -> None:
    """Brings the one event file of each of a run's folders to where it belongs, whole."""
    for file in made.rglob("events.*"):
        place = run / file.parent.relative_to(made)
        place.mkdir(parents=True, exist_ok=True)
        write_whole(str(place / _EVENTS), file.read_bytes())
