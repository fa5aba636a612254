"""Records for other tools: one CSV table, or a TensorBoard log with a run a trial."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields

import pyarrow as pa
from pyarrow import csv

from raybsa.results.record import Measured, Record, SeriesPoint

_HPARAMS = ("task", "variant", "pattern", "block_size", "seq_len", "train_len", "seed", "status")


def write_csv(records: Sequence[Record], path: str) -> None:
    """One row a record, one column a field; empty where nothing was measured."""
    columns = {field.name: [getattr(record, field.name) for record in records] for field in fields(Record)}
    csv.write_csv(pa.table(columns), path)


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
