"""Records for other tools: one CSV table, or a TensorBoard log with a run a trial."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields

import pyarrow as pa
from pyarrow import csv

from raybsa.results.record import Measured, Record, SeriesPoint
from raybsa.results.whole import write_whole

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

    Raises:
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
        with SummaryWriter(os.path.join(folder, record.trial_id)) as writer:
            for point in curves[record.trial_id]:
                tag = f"{point.name}/rank{point.rank}" if point.rank else point.name
                writer.add_scalar(tag, point.value, point.step)
            writer.add_hparams(asked, numbers, name="hparams")
