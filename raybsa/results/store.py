"""Store: records and series as Parquet files in one folder, local or on any filesystem that pyarrow knows.

``records/<trial_id>.parquet`` holds one Record, ``series/<trial_id>.parquet`` its curves. A file appears whole or not
at all: locally it is written under a temporary name and renamed, elsewhere it is one PUT. ``compact`` joins finished
trials into one file; readers take each trial once, whatever a crash in between leaves behind.
"""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Iterable
from dataclasses import asdict, fields
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from raybsa.results.reach import filesystem_of
from raybsa.results.record import Record, SeriesPoint

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COMPACTED = "compacted-"
_READ_ATTEMPTS = 5

Row = TypeVar("Row", Record, SeriesPoint)


class File(NamedTuple):
    """A results file as it was when it was listed."""

    path: str
    mtime_ns: int
    size: int

    @property
    def trial_id(self) -> str:
        """The trial that it is named after."""
        return os.path.basename(self.path).removesuffix(".parquet")

    @property
    def is_compacted(self) -> bool:
        """Whether it holds many trials; any other holds the one that it is named after."""
        return os.path.basename(self.path).startswith(_COMPACTED)


class StoreError(OSError):
    """The results folder cannot be written or read; the message names it and the reason."""


class Store:
    """One folder of results. Making a Store changes nothing, but a cloud must answer within seconds; ``create`` makes
    the folder and proves it writable.

    Args:
        root: a local path, or a URI of ``pyarrow.fs`` (``s3://bucket/results``, ``gs://…``, ``file:///…``).
        filesystem: an open ``pyarrow.fs.FileSystem`` on which ``root`` is a path; None finds it from ``root``.

    Raises:
        StoreError: ``root`` is neither, or its filesystem does not answer.
    """

    def __init__(self, root: str | os.PathLike[str], *, filesystem: fs.FileSystem | None = None) -> None:
        self.root = os.path.expanduser(os.fspath(root))
        try:
            self._fs, self._path = (filesystem, self.root) if filesystem else filesystem_of(self.root)
        except (ValueError, pa.ArrowNotImplementedError) as error:
            raise StoreError(f"results must be a local path or a pyarrow.fs URI, got {self.root!r}: {error}") from error
        except OSError as error:
            raise StoreError(f"results cannot be reached at {self.root!r}: {error}") from error
        self._local = isinstance(self._fs, fs.LocalFileSystem)

    @classmethod
    def create(cls, root: str | os.PathLike[str], *, filesystem: fs.FileSystem | None = None) -> Store:
        """A store that is proven writable, before anything is measured.

        Raises:
            StoreError: the folder cannot be made, or a probe file cannot be written and deleted in it.
        """
        store = cls(root, filesystem=filesystem)
        try:
            for kind in ("records", "series"):
                store._fs.create_dir(f"{store._path}/{kind}", recursive=True)
                probe = f"{store._path}/{kind}/.probe-{uuid.uuid4().hex}"
                store._put(probe, b"probe")
                store._fs.delete_file(probe)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"results must go to a folder that can be written, got {store.root!r}: {error}") from error
        return store

    # ---- writing -----------------------------------------------------------------------------------------------

    def write_record(self, record: Record) -> None:
        """Writes one trial's record; a second write of the same trial replaces the first."""
        self._put(self._file("records", record.trial_id), _to_parquet(Record, [record]))

    def write_series(self, points: Iterable[SeriesPoint]) -> None:
        """Writes the curves of one trial (all its points at once; no points, no file)."""
        rows = list(points)
        trials = {point.trial_id for point in rows}
        if len(trials) > 1:
            raise ValueError(f"series are written one trial at a time, got points of {sorted(trials)}")
        for trial in trials:
            self._put(self._file("series", trial), _to_parquet(SeriesPoint, rows))

    def read_file(self, name: str) -> bytes:
        """Another file of this folder. Raises FileNotFoundError where there is none."""
        with self._fs.open_input_file(f"{self._path}/{name}") as source:
            return source.read()

    def write_file(self, name: str, data: bytes) -> str:
        """Writes another file of this folder (``name`` may have folders), whole or not at all; returns its path."""
        path = f"{self._path}/{name}"
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        self._put(path, data)
        return f"{self.root.rstrip('/')}/{name}"

    def delete_folder(self, name: str) -> None:
        """Deletes a folder of ``write_file``'s, if it is there."""
        path = f"{self._path}/{name}"
        if self._fs.get_file_info(path).type == fs.FileType.Directory:
            self._fs.delete_dir(path)

    def compact(self) -> int:
        """Joins the trials at hand into one file of records and one of series; returns the number of records.

        Only for finished runs: a trial that is written again later is read from its own, newer file. A crash on the way
        leaves both forms, which readers understand and the next ``compact`` tidies up.
        """
        self._compact("series", SeriesPoint)
        return self._compact("records", Record)

    # ---- reading -----------------------------------------------------------------------------------------------

    def read_records(self) -> list[Record]:
        """Every trial's record once, ordered by creation. Columns that an older schema lacks are None.

        Raises:
            StoreError: a ``.parquet`` file in the folder is not readable as one; the message names it.
        """
        trials = self._read("records", Record)[0]
        rows = [row for rows in trials.values() for row in rows]
        return sorted(rows, key=lambda row: (row.created_at or "", row.trial_id))

    def read_series(self) -> list[SeriesPoint]:
        """Every trial's curves once, ordered by trial, name, step and rank."""
        trials = self._read("series", SeriesPoint)[0]
        rows = [row for rows in trials.values() for row in rows]
        return sorted(rows, key=lambda row: (row.trial_id, row.name, row.step, row.rank))

    def files(self, kind: str) -> list[File]:
        """The files of ``"records"`` or ``"series"``: compacted ones first, so that a trial's own, newer file has the
        last word."""
        selector = fs.FileSelector(f"{self._path}/{kind}", allow_not_found=True)
        files = [info for info in self._fs.get_file_info(selector) if info.type == fs.FileType.File]
        whole = [f for f in files if f.base_name.endswith(".parquet") and not f.base_name.startswith(".")]
        whole.sort(key=lambda f: (not f.base_name.startswith(_COMPACTED), f.mtime_ns or 0, f.base_name))
        return [File(f.path, f.mtime_ns or 0, f.size or 0) for f in whole]

    def stamp(self, kind: str) -> int | None:
        """A number that changes whenever a file of a kind comes, goes or is replaced; None where none can be had
        without listing (not a local folder)."""
        try:
            return os.stat(f"{self._path}/{kind}").st_mtime_ns if self._local else None
        except FileNotFoundError:
            return 0

    def table(self, path: str) -> pa.Table:
        """What a file holds.

        Raises:
            FileNotFoundError: a compaction took it away.
            StoreError: it is not readable as Parquet; the message names it.
        """
        try:
            with self._fs.open_input_file(path) as source:
                return pq.ParquetFile(source).read(use_threads=False)
        except pa.ArrowInvalid as error:
            raise StoreError(f"a results file must be Parquet, got {path!r}: {error}") from error

    # ---- for ourselves -----------------------------------------------------------------------------------------

    def _file(self, kind: str, name: str) -> str:
        if not _SAFE.fullmatch(name):
            raise ValueError(
                f"a trial id holds letters, digits, '.', '_' and '-' (first a letter or digit), got {name!r}"
            )
        return f"{self._path}/{kind}/{name}.parquet"

    def _put(self, path: str, data: bytes) -> None:
        if self._local:
            _write_and_rename(path, data)
            return
        with self._fs.open_output_stream(path) as stream:
            stream.write(data)

    def _compact(self, kind: str, row_type: type[Row]) -> int:
        trials, paths = self._read(kind, row_type)
        if len(paths) > 1:
            rows = [row for rows in trials.values() for row in rows]
            joined = f"{self._path}/{kind}/{_COMPACTED}{uuid.uuid4().hex[:12]}.parquet"
            self._put(joined, _to_parquet(row_type, rows))
            for path in paths:
                self._fs.delete_file(path)
        return len(trials)

    def _read(self, kind: str, row_type: type[Row]) -> tuple[dict[str, list[Row]], list[str]]:
        """Rows by trial, and the files that they came from. Starts over if a compaction takes a file away."""
        for _ in range(_READ_ATTEMPTS):
            paths = [file.path for file in self.files(kind)]
            try:
                tables = [self.table(path) for path in paths]
            except FileNotFoundError:
                continue
            trials: dict[str, list[Row]] = {}
            for table in tables:
                held: dict[str, list[Row]] = {}
                for row in rows_of(row_type, table):
                    held.setdefault(row.trial_id, []).append(row)
                trials.update(held)
            return trials, paths
        raise StoreError(f"files vanish from {self.root!r} faster than they can be read ({_READ_ATTEMPTS} attempts)")


def _write_and_rename(path: str, data: bytes) -> None:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _schema(row_type: type) -> pa.Schema:
    hints = get_type_hints(row_type)
    return pa.schema([(field.name, _arrow_type(hints[field.name])) for field in fields(row_type)])


def _arrow_type(hint: Any) -> pa.DataType:
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return _ARROW[hint]


def _to_parquet(row_type: type, rows: list) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=_schema(row_type)), buffer)
    return buffer.getvalue()


def rows_of(row_type: type[Row], table: pa.Table) -> list[Row]:
    """The rows of a results file; columns that it lacks are None, columns that we do not know are left out."""
    names = [field.name for field in fields(row_type)]
    held = set(table.column_names)
    nothing = [None] * table.num_rows
    columns = [table.column(name).to_pylist() if name in held else nothing for name in names]
    return [row_type(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]
