"""Budget: a search's time, by one clock: the driver's own, which nobody sets. Workers ask the driver whether it is up,
whatever the time of day is where they run."""

from __future__ import annotations

import math
import time
from typing import Any

from ray import tune
from ray.experimental import internal_kv


class Budget(tune.Callback):
    """Tells the cluster once ``seconds`` are over; a context manager.

    Args:
        name: of the search, of which a cluster may run several.
    """

    def __init__(self, seconds: float, name: str) -> None:
        self.deadline, self.key = time.monotonic() + seconds, f"raybsa-time-is-up-{name}".encode()
        self._told = False

    def __enter__(self) -> Budget:
        return self

    def __exit__(self, *error: object) -> None:
        if self._told and internal_kv._internal_kv_initialized():
            internal_kv._internal_kv_del(self.key)

    @property
    def question(self) -> bytes | None:
        """What a worker asks ``is_up`` with; None where the time is not bounded."""
        return None if math.isinf(self.deadline) else self.key

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        if not self._told and time.monotonic() >= self.deadline:
            internal_kv._internal_kv_put(self.key, b"1")
            self._told = True


def is_up(question: bytes | None) -> bool:
    """Whether the driver of a search has said that its time is up."""
    return question is not None and internal_kv._internal_kv_exists(question)
