"""Overlap: how much of the time in which gradients travel lies within backward, and so costs nothing."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from raybsa.comm import Phase


@dataclass(frozen=True)
class Overlap:
    """Seconds in which a rank's gradients were under way, over steps: within backward, and in all."""

    within_s: float = 0.0
    total_s: float = 0.0

    @property
    def share(self) -> float:
        """Of the transfers' time, what lay within backward; 0 where nothing travelled."""
        return self.within_s / self.total_s if self.total_s else 0.0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.within_s + other.within_s, self.total_s + other.total_s)


class OverlapMeter:
    """An ``Observer`` of the communicator on which gradients travel, by the host's clock: for gloo, where a transfer
    ends when its wait does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: list[float] = []
        self._spans: list[tuple[float, float]] = []

    def begin(self, phase: Phase, kind: str, hop: int) -> None:
        if phase is Phase.TRANSFER:
            with self._lock:
                self._begun.append(time.perf_counter())

    def end(self, phase: Phase, kind: str, hop: int) -> None:
        if phase is Phase.TRANSFER:
            with self._lock:
                self._spans.append((self._begun.pop(0), time.perf_counter()))

    def take(self, backward_end_s: float) -> Overlap:
        """What travelled since the last call, for a backward that ended then (of ``perf_counter``)."""
        with self._lock:
            spans, self._spans = self._spans, []
        within = sum(max(0.0, min(end, backward_end_s) - begin) for begin, end in spans)
        return Overlap(within, sum(end - begin for begin, end in spans))
