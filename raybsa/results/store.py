"""Store: records and series as Parquet files in one folder, local or on any filesystem that pyarrow knows.

``records/<trial_id>.parquet`` holds one Record, ``series/<trial_id>.parquet`` its curves; ``.raybsa/`` marks the folder
as one of results and keeps the digest of each other file that was written here, so that nothing of somebody else's is
ever replaced or deleted. A file appears whole or not
at all: locally it is written under a temporary name and renamed, elsewhere it is one PUT. ``compact`` joins finished
trials into one file; readers take each trial once, whatever a crash in between leaves behind.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import sys
import uuid
from collections.abc import Iterable
from contextlib import suppress
from typing import Generic, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from raybsa.results.marked import MADE, MARK
from raybsa.results.reach import filesystem_of
from raybsa.results.record import Record, SeriesPoint, spec_of
from raybsa.results.rows import Row, rows_of, to_parquet, unknown_columns
from raybsa.results.shared import SharedFolder
from raybsa.results.whole import tidy, write_whole

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COMPACTED = "compacted-"
_READ_ATTEMPTS = 5
_told: set[str] = set()  # each problem once in a process, however many stores meet it


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


class _Read(NamedTuple, Generic[Row]):
    """Rows by trial, and the files that were read whole: without a column that we do not know."""

    trials: dict[str, list[Row]]
    whole: list[File]


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
        self.problems: list[str] = []

    @classmethod
    def create(
        cls, root: str | os.PathLike[str], *, filesystem: fs.FileSystem | None = None, adopt: bool = True
    ) -> Store:
        """A store that is proven writable, before anything is measured.

        Args:
            adopt: also in a folder that holds files of somebody else's, which stay as they are. Jobs ask their user.

        Raises:
            StoreError: the folder cannot be made, or a probe file cannot be written and deleted in it; or it is none of
                results, and holds something (hidden files do not count).
        """
        store = cls(root, filesystem=filesystem)
        try:
            others = [] if adopt else store._others()
            if not others:
                store._make()
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"results must go to a folder that can be written, got {store.root!r}: {error}") from error
        if others:
            raise StoreError(
                f"results must go to a folder of their own, got {store.root!r}, which holds "
                f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}: name another folder, or say --adopt "
                f"to put them beside these, which stay as they are"
            )
        return store

    # ---- writing -----------------------------------------------------------------------------------------------

    def write_record(self, record: Record) -> None:
        """Writes one trial's record; a second write of the same trial replaces the first."""
        self._put(self._file("records", record.trial_id), to_parquet(Record, [record]))

    def write_series(self, points: Iterable[SeriesPoint]) -> None:
        """Writes the curves of one trial (all its points at once; no points, no file)."""
        rows = list(points)
        trials = {point.trial_id for point in rows}
        if len(trials) > 1:
            raise ValueError(f"series are written one trial at a time, got points of {sorted(trials)}")
        for trial in trials:
            self._put(self._file("series", trial), to_parquet(SeriesPoint, rows))

    def read_file(self, name: str) -> bytes:
        """Another file of this folder. Raises FileNotFoundError where there is none."""
        with self._fs.open_input_file(f"{self._path}/{name}") as source:
            return source.read()

    def write_file(self, name: str, data: bytes) -> str:
        """Writes another file of this folder (``name`` may have folders), whole or not at all, in place of one that it
        wrote itself; returns its path.

        Raises:
            StoreError: there is something that it did not write, or that was changed since.
        """
        path = f"{self.root.rstrip('/')}/{name}"
        if not self.is_free(name):
            raise StoreError(f"a place for results was wanted, got {path!r}, which no job wrote: it stays as it is")
        self._put_deep(name, data)
        self._put_deep(f"{MADE}/{name}", _digest(data))
        return path

    def is_free(self, name: str) -> bool:
        """Whether ``write_file`` may write there: nothing is there, or what it wrote itself, unchanged."""
        kind = self._fs.get_file_info(f"{self._path}/{name}").type
        return kind == fs.FileType.NotFound or (kind == fs.FileType.File and self._is_made(name))

    def free_name(self, name: str) -> str:
        """``name``, or the first of ``name-2``, ``name-3``, … (before its ending) that is free."""
        stem, ending = os.path.splitext(name)
        others = (f"{stem}-{number}{ending}" for number in itertools.count(2))
        return next(one for one in itertools.chain([name], others) if self.is_free(one))

    def made(self, folder: str) -> list[str]:
        """The names of the files under a folder that ``write_file`` wrote and nobody changed, ascending."""
        selector = fs.FileSelector(f"{self._path}/{MADE}/{folder}", allow_not_found=True, recursive=True)
        marks = [info.path for info in self._fs.get_file_info(selector) if info.type == fs.FileType.File]
        names = (path.partition(f"/{MADE}/")[2] for path in marks)
        return sorted(name for name in names if self._exists(name) and self._is_made(name))

    def delete_made(self, folder: str) -> None:
        """Deletes what ``made`` names, and the folders that this leaves empty."""
        for name in self.made(folder):
            self._fs.delete_file(f"{self._path}/{name}")
            self._fs.delete_file(f"{self._path}/{MADE}/{name}")
            self._delete_if_empty(name.rpartition("/")[0])

    def shared(self, name: str) -> SharedFolder:
        """A folder of this one, of small files that several processes make and take away."""
        return SharedFolder(self._fs, f"{self._path}/{name}", self._local)

    def compact(self) -> int:
        """Joins the trials at hand into one file of records and one of series; returns the number of records.

        Only for finished runs: a trial that is written again later is read from its own, newer file. A crash on the way
        leaves both forms, which readers understand and the next ``compact`` tidies up; two at once do no harm. What
        cannot be read, or holds columns that would be lost, stays as it is.
        """
        self._compact("series", SeriesPoint)
        return self._compact("records", Record)

    # ---- reading -----------------------------------------------------------------------------------------------

    def read_records(self) -> list[Record]:
        """Every trial's record once, ordered by creation. Columns that an older schema lacks are None. What cannot be
        read is left out, and told: ``problems``.

        Raises:
            StoreError: files vanish faster than they can be read.
            OSError: the folder cannot be listed.
        """
        rows = [row for rows in self._read("records", Record).trials.values() for row in rows]
        return sorted(rows, key=lambda row: (row.created_at or "", row.trial_id))

    def read_asked(self) -> list[Record]:
        """``read_records``, less those whose question cannot be read: of a newer version, or damaged."""
        return [record for record in self.read_records() if self._has_question(record)]

    def read_series(self) -> list[SeriesPoint]:
        """Every trial's curves once, ordered by trial, name, step and rank; what cannot be read as in
        ``read_records``."""
        rows = [row for rows in self._read("series", SeriesPoint).trials.values() for row in rows]
        return sorted(rows, key=lambda row: (row.trial_id, row.name, row.step, row.rank))

    def pass_over(self, trial_id: str, reason: str) -> None:
        """A row is left out by who reads it: one of the ``problems``."""
        file = f"{self.root.rstrip('/')}/records/{trial_id}.parquet"
        own = bool(_SAFE.fullmatch(trial_id)) and self._exists(f"records/{trial_id}.parquet")
        self._tell(f"{file if own else f'{self.root}, trial {trial_id}'}: {reason}")

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
            StoreError: it is not readable as Parquet, or not at all; the message names it.
        """
        try:
            with self._fs.open_input_file(path) as source:
                return pq.ParquetFile(source).read(use_threads=False)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError) as error:  # of a damaged page pyarrow says OSError
            raise StoreError(f"a results file must be Parquet, got {path!r}: {_line(error)}") from error

    def rows(self, row_type: type[Row], path: str) -> list[Row]:
        """The rows of a file. Raises as ``table``, and StoreError where they are no rows of ours."""
        return self._rows(row_type, path, self.table(path))

    # ---- for ourselves -----------------------------------------------------------------------------------------

    def _file(self, kind: str, name: str) -> str:
        if not _SAFE.fullmatch(name):
            raise ValueError(
                f"a trial id holds letters, digits, '.', '_' and '-' (first a letter or digit), got {name!r}"
            )
        return f"{self._path}/{kind}/{name}.parquet"

    def _put(self, path: str, data: bytes) -> None:
        try:
            if self._local:
                write_whole(path, data)
                return
            with self._fs.open_output_stream(path) as stream:
                stream.write(data)
        except (OSError, pa.ArrowException) as error:
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            raise StoreError(f"results could not be written to {path!r}: {reason}") from error

    def _has_question(self, record: Record) -> bool:
        try:
            spec_of(record)
        except ValueError as error:
            self.pass_over(record.trial_id, str(error))
            return False
        return True

    def _make(self) -> None:
        for kind in ("records", "series"):
            self._fs.create_dir(f"{self._path}/{kind}", recursive=True)
            self._tidy(kind)
            probe = f"{self._path}/{kind}/.probe-{uuid.uuid4().hex}"
            self._put(probe, b"probe")
            self._fs.delete_file(probe)
        self._put_deep(MARK, b"raybsa writes its results into this folder\n")

    def _others(self) -> list[str]:
        """The names in a folder that is none of results, but for hidden ones."""
        entries = self._fs.get_file_info(fs.FileSelector(self._path, allow_not_found=True))
        names = sorted(entry.base_name for entry in entries if not entry.base_name.startswith("."))
        return [] if self._exists(MARK) or self._is_older() else [name for name in names if name != "lost+found"]

    def _is_older(self) -> bool:
        """Whether a version before the mark wrote here: there are rows of trials."""
        with suppress(StoreError):
            return any("spec_hash" in self.table(file.path).column_names for file in self.files("records")[:1])
        return False

    def _is_made(self, name: str) -> bool:
        try:
            return self.read_file(f"{MADE}/{name}") == _digest(self.read_file(name))
        except FileNotFoundError:
            return False

    def _put_deep(self, name: str, data: bytes) -> None:
        path = f"{self._path}/{name}"
        self._fs.create_dir(path.rpartition("/")[0], recursive=True)
        self._put(path, data)

    def _delete_if_empty(self, name: str) -> None:
        """Nothing that comes meanwhile is lost: where a folder is no file's name prefix, the system refuses."""
        if self._local and name:
            with suppress(OSError):
                os.removedirs(f"{self._path}/{name}")

    def _exists(self, name: str) -> bool:
        return self._fs.get_file_info(f"{self._path}/{name}").type == fs.FileType.File

    def _tidy(self, kind: str) -> None:
        if self._local:
            tidy(f"{self._path}/{kind}")

    def _tell(self, problem: str) -> None:
        """Once in this store's ``problems``, once on stderr in this process."""
        if problem not in self.problems:
            self.problems.append(problem)
        if problem not in _told:
            _told.add(problem)
            print(f"left out: {problem}", file=sys.stderr, flush=True)

    def _compact(self, kind: str, row_type: type[Row]) -> int:
        read = self._read(kind, row_type)
        if len(read.whole) > 1:
            rows = [row for rows in read.trials.values() for row in rows]
            joined = f"{self._path}/{kind}/{_COMPACTED}{uuid.uuid4().hex[:12]}.parquet"
            self._put(joined, to_parquet(row_type, rows))
            for file in read.whole:
                self._delete_as_read(file)
        return len(read.trials)

    def _delete_as_read(self, file: File) -> None:
        """Deletes a file that was joined into another: not where another compaction did, or its trial was written
        again meanwhile."""
        now = self._fs.get_file_info(file.path)
        if now.type == fs.FileType.File and ((now.mtime_ns or 0), (now.size or 0)) == (file.mtime_ns, file.size):
            with suppress(FileNotFoundError):
                self._fs.delete_file(file.path)

    def _read(self, kind: str, row_type: type[Row]) -> _Read[Row]:
        """Starts over if a compaction takes a file away."""
        for _ in range(_READ_ATTEMPTS):
            try:
                return self._read_once(kind, row_type)
            except FileNotFoundError:
                continue
        raise StoreError(f"files vanish from {self.root!r} faster than they can be read ({_READ_ATTEMPTS} attempts)")

    def _read_once(self, kind: str, row_type: type[Row]) -> _Read[Row]:
        read: _Read[Row] = _Read({}, [])
        for file in self.files(kind):
            try:
                table = self.table(file.path)
                rows = self._rows(row_type, file.path, table)
            except StoreError as error:
                self._tell(str(error))
                continue
            if not unknown_columns(row_type, table):
                read.whole.append(file)
            held: dict[str, list[Row]] = {}
            for row in rows:
                held.setdefault(row.trial_id, []).append(row)
            read.trials.update(held)
        return read

    def _rows(self, row_type: type[Row], path: str, table: pa.Table) -> list[Row]:
        try:
            return rows_of(row_type, table)
        except (pa.ArrowException, ValueError) as error:
            raise StoreError(f"a results file must hold rows of trials, got {path!r}: {_line(error)}") from error


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
