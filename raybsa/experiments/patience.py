"""Patience: a search in which no trial can run ends after a bounded wait, and says what is missing.

A cluster may shrink while a search runs; Ray Tune alone would wait for ever for what is not there any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray import tune

from raybsa.cluster.resources import Say, Share, TooFewResources, alive_nodes, fitting, wanted, why_not_up
from raybsa.experiments.space import Config

_LOOK_EVERY_S = 5.0


class Patience(tune.Callback):
    """Raises TooFewResources out of the search once nothing has run for twice ``wait_s`` seconds: the time for what a
    trial needs to be there, and for its processes to start.

    Args:
        share: what each worker owns.
        ranks: how many workers a configuration needs at once.
        say: told every few seconds, where the cluster is too small.
    """

    def __init__(self, share: Share, ranks: Callable[[Config], int], wait_s: float, say: Say) -> None:
        self._share, self._ranks, self._limit_s, self._say = share, ranks, 2 * wait_s, say
        self._since = self._looked = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes its callbacks down, and no one reads them again; ``print``, which Ray replaces, could
        not even be written."""
        return {}

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        now = time.monotonic()
        states = {trial.status for trial in trials}
        if "RUNNING" in states or "PENDING" not in states:
            self._since = self._looked = now
        elif now - self._since > self._limit_s:
            raise TooFewResources(f"{self._state(trials)}; gave up after {self._limit_s:g} s")
        elif now - self._looked > _LOOK_EVERY_S:
            self._looked = now
            if fitting(self._share, alive_nodes()) < self._needed(trials):
                self._say(f"waiting up to {self._limit_s - (now - self._since):.0f} s: {self._state(trials)}")

    def _needed(self, trials: list) -> int:
        return min(self._ranks(trial.config) for trial in trials if trial.status == "PENDING")

    def _state(self, trials: list) -> str:
        count = self._needed(trials)
        why = why_not_up(self._share, count, alive_nodes(), ray.available_resources())
        return f"{wanted(self._share, count)}; no trial can run: {why}"
