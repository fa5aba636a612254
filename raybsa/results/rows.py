"""Rows as Parquet and back: one dataclass a row, its fields in order are the columns."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from raybsa.results.record import Record, SeriesPoint

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}

Row = TypeVar("Row", Record, SeriesPoint)


def to_parquet(row_type: type[Row], rows: Sequence[Row]) -> bytes:
    """The file that holds the rows."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMAS[row_type]), buffer)
    return buffer.getvalue()


def rows_of(row_type: type[Row], table: pa.Table) -> list[Row]:
    """The rows of a results file; columns that it lacks are None, columns that we do not know are left out.

    Raises:
        pa.ArrowException: a column's values are of another type than ours.
        ValueError: no ``trial_id`` in some row, or a text that is not UTF-8.
    """
    if "trial_id" not in table.column_names:
        raise ValueError(f"a column trial_id was wanted, got {table.column_names[:5]}")
    table = _typed(row_type, table)
    names = [field.name for field in fields(row_type)]
    held = set(table.column_names)
    nothing = [None] * table.num_rows
    columns = [table.column(name).to_pylist() if name in held else nothing for name in names]
    rows = [row_type(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]
    nameless = [number for number, row in enumerate(rows) if not row.trial_id]
    if nameless:
        raise ValueError(f"rows of trials were wanted, got no trial_id in row {nameless[0]}")
    return rows


def unknown_columns(row_type: type, table: pa.Table) -> list[str]:
    """What a file holds beside our columns: a newer version wrote it, or somebody else."""
    return [name for name in table.column_names if name not in _SCHEMAS[row_type].names]


def _typed(row_type: type, table: pa.Table) -> pa.Table:
    """The columns that we know, in our types."""
    ours = _SCHEMAS[row_type]
    if table.schema.equals(ours):
        return table
    known = [field for field in ours if field.name in table.column_names]
    return table.select([field.name for field in known]).cast(pa.schema(known))


def _arrow_type(hint: Any) -> pa.DataType:
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return _ARROW[hint]


def _schema(row_type: type) -> pa.Schema:
    hints = get_type_hints(row_type)
    return pa.schema([(field.name, _arrow_type(hints[field.name])) for field in fields(row_type)])


_SCHEMAS: dict[type, pa.Schema] = {row_type: _schema(row_type) for row_type in (Record, SeriesPoint)}
