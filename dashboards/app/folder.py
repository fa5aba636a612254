"""The results folder as it is now."""

from __future__ import annotations

import threading

from dashboards.frames import Results, Trial, trial_of
from raybsa.results.store import Store, StoreError
from raybsa.results.watched import Curves, Records

_FIRST, _SECONDS = 0.8, 1.6  # that the first look and later ones read for; a view shows what was read by then


class Folder:
    """A results folder (a path or a ``pyarrow.fs`` URI) that jobs may be writing to.

    Threads of the server share it. ``version`` grows whenever there is something new to show.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        store = Store(root)
        self._records: Records[Trial] = Records(store, trial_of)
        self._curves = Curves(store)
        self._lock = threading.Lock()
        self._problem: str | None = None
        self._trials: tuple[Trial, ...] = ()
        self.version = 0

    def look(self, before: int | None) -> int:
        """The version for a reader who has seen ``before``: one who comes (None) need not wait for what is still to be
        read, where something was; the next look reads on."""
        return self.version if before is None and self.version else self.refresh()

    def refresh(self) -> int:
        """Looks for new rows and reads them; returns the version. Does next to nothing where nothing is new."""
        with self._lock:
            try:
                found = [
                    self._records.look(),
                    self._curves.look(),
                    self._records.read(_SECONDS if self.version else _FIRST) > 0,
                ]
                problem = None
            except (OSError, StoreError) as error:
                found, problem = [], f"{self.root}: {error}"
            if any(found) or problem != self._problem or not self.version:
                trials = self._records.rows
                self._trials = tuple(sorted(trials, key=lambda t: (t.record.created_at or "", t.id)))
                self._problem = problem
                self.version += 1
            return self.version

    @property
    def results(self) -> Results:
        """What has been read."""
        return Results(self._trials, self._curves)

    @property
    def notes(self) -> list[str]:
        """What a reader should know: how much is still to be read, and what cannot be read."""
        with self._lock:
            unread, problems = self._records.unread, self._records.problems
        told = [f"{unread:,} files are still to be read."] if unread else []
        told += [self._problem] if self._problem else []
        told += [f"Not readable: {problem}" for problem in problems[:5]]
        return told + ([f"{len(problems) - 5} more rows or files are not readable."] if len(problems) > 5 else [])
