"""Timeline: what one rank did when, as an observer of its communicator; and spans as rows of the series table.

On the CPU marks are taken from ``time.perf_counter``, which the processes of one host share. On CUDA they are events of
the current stream, read once the step is over, with the first mark of each rank as its zero: start ranks together, from
a barrier. A transfer's span ends where its rank has waited for it, which may be later than the last byte; what a
transfer cost is the *wait* beside it (gloo only: on NCCL no host waits, and a gap between two attentions is the wait).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from raybsa.comm import Phase
from raybsa.results.record import SeriesPoint

PREFIX = "timeline"
Point = tuple[str, int, int, float]  # name, step, rank, value


class Span(NamedTuple):
    """One thing that one rank did, in seconds from the step's begin. ``hop`` is the shift of the plan's hop."""

    rank: int
    phase: str
    kind: str
    hop: int
    begin_s: float
    end_s: float


class Timeline:
    """An ``Observer`` that remembers when each phase began and ended.

    Args:
        rank: of the communicator that it observes.
        device: where the work runs.
    """

    def __init__(self, rank: int, device: torch.device | str = "cpu") -> None:
        self.rank = rank
        self._cuda = torch.device(device).type == "cuda"
        self._open: dict[tuple[Phase, str, int], list[Any]] = defaultdict(list)
        self._closed: list[tuple[Phase, str, int, Any, Any]] = []

    def begin(self, phase: Phase, kind: str, hop: int) -> None:
        self._open[phase, kind, hop].append(self._mark())

    def end(self, phase: Phase, kind: str, hop: int) -> None:
        """An end without a begin (a collective's transfer) is no span."""
        begun = self._open[phase, kind, hop]
        if begun:
            self._closed.append((phase, kind, hop, begun.pop(0), self._mark()))

    def spans(self, origin_s: float | None = None) -> list[Span]:
        """What has ended, by begin. ``origin_s``: the zero, a ``perf_counter`` value (CPU); None is the first begin."""
        if not self._closed:
            return []
        at = self._seconds()
        zero = min(at(begin) for *_, begin, _ in self._closed) if origin_s is None or self._cuda else origin_s
        found = [
            Span(self.rank, str(phase), kind, hop, at(begin) - zero, at(end) - zero)
            for phase, kind, hop, begin, end in self._closed
        ]
        return sorted(found, key=lambda span: (span.begin_s, span.end_s))

    def _seconds(self) -> Callable[[Any], float]:
        if not self._cuda:
            return float
        torch.cuda.synchronize()
        first = self._closed[0][3]
        return lambda mark: first.elapsed_time(mark) / 1e3

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def as_points(spans: Iterable[Span]) -> list[Point]:
    """Two points a span, ``timeline/<phase>/<kind>/<hop>/begin_s`` and ``…/end_s``; ``step`` counts equal names."""
    points: list[Point] = []
    counted: Counter[tuple[str, int]] = Counter()
    for span in spans:
        name = f"{PREFIX}/{span.phase}/{span.kind}/{span.hop}"
        step = counted[name, span.rank]
        counted[name, span.rank] += 1
        points += [(f"{name}/begin_s", step, span.rank, span.begin_s), (f"{name}/end_s", step, span.rank, span.end_s)]
    return points


def from_series(series: Sequence[SeriesPoint], trial_id: str) -> list[Span]:
    """The spans of one trial, by rank and begin. Points of other names are not spans; half a span is none."""
    halves: dict[tuple[str, int, int], dict[str, float]] = defaultdict(dict)
    for point in series:
        parts = point.name.split("/")
        if point.trial_id == trial_id and parts[0] == PREFIX and len(parts) == 5:
            halves["/".join(parts[1:4]), point.step, point.rank][parts[4]] = point.value
    spans = []
    for (name, _, rank), times in halves.items():
        if {"begin_s", "end_s"} <= set(times):
            phase, kind, hop = name.split("/")
            spans.append(Span(rank, phase, kind, int(hop), times["begin_s"], times["end_s"]))
    return sorted(spans, key=lambda span: (span.rank, span.begin_s, span.end_s))
