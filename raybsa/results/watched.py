"""A results folder that is looked at again and again: each file is read once, and again only when it was replaced."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import pyarrow as pa

from raybsa.results.record import Record, SeriesPoint
from raybsa.results.rows import rows_of
from raybsa.results.store import File, Store, StoreError

T = TypeVar("T")
_SETTLED_NS = 2_000_000_000  # a folder changed longer ago than a clock's tick cannot change again at the same time


class Listing:
    """The files of one kind, listed again only where the folder may have changed."""

    def __init__(self, store: Store, kind: str) -> None:
        self._store, self._kind = store, kind
        self._stamp: int | None = None
        self.files: list[File] = []

    def look(self) -> bool:
        """Whether a file came, went or was replaced since the last look."""
        stamp = self._store.stamp(self._kind)
        if stamp is not None and stamp == self._stamp:
            return False
        self._stamp = None if stamp is None or time.time_ns() - stamp < _SETTLED_NS else stamp
        before, self.files = self.files, self._store.files(self._kind)
        return self.files != before


class Records(Generic[T]):
    """The rows of all trials.

    Args:
        store: of which folder.
        parse: a record -> what is kept of it. A ValueError of it leaves that row out and is one of the ``problems``.
    """

    def __init__(self, store: Store, parse: Callable[[Record], T]) -> None:
        self._store, self._parse = store, parse
        self._listing = Listing(store, "records")
        self._held: dict[File, tuple[dict[str, T], list[str]]] = {}

    def look(self) -> bool:
        """Whether a file came, went or was replaced since the last look."""
        changed = self._listing.look()
        self._held = {file: self._held[file] for file in self._listing.files if file in self._held}
        return changed

    def read(self, seconds: float) -> int:
        """Reads the newest files that are not read yet for about ``seconds``, one at least; returns how many."""
        end, count = time.monotonic() + seconds, 0
        for file in reversed(self._listing.files):
            if file not in self._held and (count == 0 or time.monotonic() < end):
                self._held[file] = self._rows(file)
                count += 1
        return count

    @property
    def unread(self) -> int:
        """Files that are listed and not read yet."""
        return len(self._listing.files) - len(self._held)

    @property
    def rows(self) -> list[T]:
        """Each trial once, as its newest file has it."""
        newest: dict[str, T] = {}
        for file in self._listing.files:
            newest |= self._held.get(file, ({}, []))[0]
        return list(newest.values())

    @property
    def problems(self) -> list[str]:
        """What could not be read, and why."""
        return [problem for _, problems in self._held.values() for problem in problems]

    def _rows(self, file: File) -> tuple[dict[str, T], list[str]]:
        rows: dict[str, T] = {}
        problems = []
        try:
            for record in self._store.rows(Record, file.path):
                try:
                    rows[record.trial_id] = self._parse(record)
                except ValueError as error:
                    problems.append(str(error))
        except (StoreError, FileNotFoundError) as error:
            problems.append(str(error))
        return rows, problems


class Curves(Mapping[str, Sequence[SeriesPoint]]):
    """The finite points of each trial's curves, read when they are asked for; none where its file cannot be read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._listing = Listing(store, "series")
        self._held: dict[File, tuple[pa.Table, dict[str, list[int]]]] = {}
        self._own: dict[str, File] = {}
        self._joined: list[File] = []

    def look(self) -> bool:
        """Whether a file came, went or was replaced since the last look."""
        changed = self._listing.look()
        self._own = {file.trial_id: file for file in self._listing.files if not file.is_compacted}
        self._joined = [file for file in self._listing.files if file.is_compacted]
        self._held = {file: self._held[file] for file in self._listing.files if file in self._held}
        return changed

    def __getitem__(self, trial_id: str) -> Sequence[SeriesPoint]:
        files = [self._own[trial_id]] if trial_id in self._own else reversed(self._joined)
        for file in files:
            table, places = self._read(file)
            if trial_id in places:
                points = rows_of(SeriesPoint, table.take(places[trial_id]))
                return [point for point in points if math.isfinite(point.value)]
        raise KeyError(trial_id)

    def __iter__(self) -> Iterator[str]:
        return iter({*self._own, *(trial for file in self._joined for trial in self._read(file)[1])})

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _read(self, file: File) -> tuple[pa.Table, dict[str, list[int]]]:
        """A file's table, and the rows of each trial in it."""
        if file not in self._held:
            places: dict[str, list[int]] = defaultdict(list)
            try:
                table = self._store.table(file.path)
                for row, trial_id in enumerate(table.column("trial_id").to_pylist()):
                    places[trial_id].append(row)
            except (StoreError, FileNotFoundError, KeyError):
                table = pa.table({})
            self._held[file] = table, dict(places)
        return self._held[file]
