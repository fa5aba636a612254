"""A search says who holds the device that its trials wait for: its workers' own words do not reach a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray import tune

from raybsa.cluster.resources import Say
from raybsa.holder import is_stopped
from raybsa.locks import PATIENCE_S, described, holders, waiters
from raybsa.timing import lock_files

_LONG_S = 60.0  # what a neighbour may take to time something, without a word


class LockWatch(tune.Callback):
    """Looks at the locks of this host's devices every few seconds; tells of each wait once: at once for a process that
    was stopped, else after a minute.

    Args:
        say: where messages go.
        files: the lock files.
    """

    def __init__(self, say: Say, files: Callable[[], list[str]] = lock_files) -> None:
        self._say, self._files = say, files
        self._looked = time.monotonic()
        self._since: dict[tuple[str, int], float] = {}
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, see Patience."""
        return {}

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        now = time.monotonic()
        if now - self._looked >= PATIENCE_S:
            self._looked = now
            self.look(now)

    def look(self, now: float) -> None:
        waits = {(path, pid) for path in self._files() for pid in waiters(path)}
        self._since = {wait: self._since.get(wait, now) for wait in waits}
        for (path, _), since in self._since.items():
            found = holders(path)
            patience = PATIENCE_S if any(is_stopped(who.pid) for who in found) else _LONG_S
            text = f"trials wait for {path}, held by {described(found)}"
            if now - since >= patience and text not in self._told:
                self._told.add(text)
                self._say(text)
