"""From measured ring rows to fitted hardware, the error of its predictions, and forecasts of what was not measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import median
from typing import NamedTuple

import torch

from raybsa import patterns
from raybsa.results.record import Record, SeriesPoint, spec_of
from raybsa.ring.cost import Prediction, Sizes, predict
from raybsa.ring.estimate import estimate
from raybsa.ring.fitting import Timed, fit
from raybsa.ring.hardware import Hardware, Pass
from raybsa.ring.rows import FAMILIES, rows_of
from raybsa.ring.work import Work, work_of
from raybsa.spec import AttentionSpec, TrialSpec
from raybsa.tasks.ring import ring_plan
from raybsa.tasks.ring_rank import CROWDING, LINK


class RingRow:
    """A finished record of a ring, with its question and the work that its plan gives."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.spec = spec_of(record)

    @property
    def attention(self) -> AttentionSpec:
        return self.spec.layer(0)

    @property
    def family(self) -> str:
        """The pattern's name."""
        assert self.attention.pattern is not None
        return self.attention.pattern.name

    @property
    def world_size(self) -> int:
        return int(self.spec.task_params.get("world_size", 1))

    @property
    def is_crowded(self) -> bool:
        """Whether ranks had to share cores or GPUs."""
        return self.record.devices is not None and self.world_size > self.record.devices

    @cached_property
    def work(self) -> Work:
        return work_of(ring_plan(self.spec))

    @cached_property
    def alone(self) -> Work:
        """The same sequence on one rank."""
        params = {**self.spec.task_params, "world_size": 1}
        return self.work if self.world_size == 1 else work_of(ring_plan(replace(self.spec, task_params=params)))

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.spec)


class Compared(NamedTuple):
    """A measured row beside its prediction; times in milliseconds."""

    row: RingRow
    predicted: Prediction

    @property
    def errors(self) -> tuple[float, float]:
        """(forward, forward + backward): predicted / measured - 1."""
        record = self.row.record
        measured = (record.forward_ms_p50 or 0.0, record.forward_backward_ms_p50 or 0.0)
        seconds = (self.predicted.forward_s, self.predicted.forward_backward_s)
        forward, both = (1e3 * s / ms - 1 for s, ms in zip(seconds, measured, strict=True))
        return forward, both


def sizes_of(spec: TrialSpec) -> Sizes:
    kv_heads = spec.num_kv_heads or spec.num_heads
    return Sizes(spec.batch, spec.num_heads, kv_heads, spec.head_dim, getattr(torch, spec.dtype).itemsize)


def ring_rows(records: Iterable[Record]) -> list[RingRow]:
    """The records of rings that finished and were timed, of densities as they are now."""
    timed = (r for r in records if r.task == "ring" and r.status == "ok" and r.forward_backward_ms_p50)
    return [row for row in map(RingRow, timed) if row.spec.is_current]


def fit_rows(rows: Sequence[RingRow], series: Iterable[SeriesPoint]) -> Hardware:
    """Hardware from rows of one device: kernels from what one rank did alone, the link from the timed
    messages, and how ranks slow each other down from a kernel that all of them ran at once.

    Raises:
        ValueError: no rows, or rows of several devices.
    """
    devices = {(row.record.device_name, row.record.devices) for row in rows}
    if len(devices) != 1:
        names = sorted(str(name) for name, _ in devices)
        raise ValueError(f"hardware is fitted to the rows of one device, got {names or 'no rows'}")
    ((name, count),) = devices
    calls = [timed for row in rows for timed in _timed(row)]
    known = {row.record.trial_id for row in rows}
    own = [point for point in series if point.trial_id in known]
    crowding: dict[int, list[float]] = defaultdict(list)
    for point in own:
        if point.name == CROWDING:
            crowding[point.step].append(max(1.0, point.value))
    fitted = fit(str(name), calls, messages_of(own), devices=count)
    hardware = replace(fitted, crowding=tuple((ranks, median(found)) for ranks, found in sorted(crowding.items())))
    over = [
        (row.record.peak_bytes or 0) - predict(row.work, row.sizes, hardware).memory_bytes for row in rows if _has(row)
    ]
    return replace(hardware, workspace_bytes=max(0.0, median(over)) if over else 0.0)


def messages_of(series: Iterable[SeriesPoint]) -> list[tuple[int, float]]:
    """(bytes, seconds) of the messages that rings timed, each once."""
    return sorted({(point.step, point.value / 1e3) for point in series if point.name == LINK})


def compare(rows: Iterable[RingRow], hardware: Hardware) -> list[Compared]:
    """Every row beside its prediction, which comes from the plan alone."""
    return [Compared(row, predict(row.work, row.sizes, hardware)) for row in rows]


def median_error_line(compared: Sequence[Compared]) -> str:
    """The median of |predicted / measured - 1| in words, by number of ranks."""
    parts = []
    for ranks in sorted({c.row.world_size for c in compared}):
        errors = [c.errors for c in compared if c.row.world_size == ranks]
        forward, both = (median(abs(error[i]) for error in errors) for i in range(2))
        word = "1 rank" if ranks == 1 else f"{ranks} ranks"
        parts.append(f"{word} {100 * forward:.3g} % forward, {100 * both:.3g} % forward + backward")
    return f"Median error: {'; '.join(parts)}."


def prediction_points(compared: Compared) -> Iterator[SeriesPoint]:
    """What the formula told of a row, in milliseconds, as series of the row's trial; the step is its ranks."""
    row, predicted = compared
    told = {"predicted_forward_ms": predicted.forward_s, "predicted_forward_backward_ms": predicted.forward_backward_s}
    for name, seconds in told.items():
        yield SeriesPoint(row.record.trial_id, name, row.world_size, 0, 1e3 * seconds)


def can_forecast(row: RingRow) -> bool:
    """Whether ``forecast`` knows the row's family and partition by statistics."""
    drawn_by_count = row.family == "random" and row.attention.density is None
    return row.family in FAMILIES and not drawn_by_count and row.record.partition != "striped"


def forecast(
    spec: TrialSpec, hardware: Hardware, *, world_size: int, seq_len: int, window: int | None = None
) -> tuple[Prediction, Prediction]:
    """(ring, alone): predictions for ``seq_len`` tokens on ``world_size`` ranks and on one, from the family's rows.

    Args:
        spec: pattern, density, block size, heads and partition.
        window: blocks to each side, instead of the density; where there is neither, the pattern's own.

    Raises:
        ValueError: a family without statistics (see ``rows_of``).
    """
    attention = spec.layer(0)
    assert attention.pattern is not None
    block = attention.block_size
    rule = patterns.build(attention.pattern)
    sinks = -(-getattr(rule, "sink", 0) // block)
    if window is None and attention.density is None and hasattr(rule, "window"):
        window = -(-(rule.window - 1) // block)
    density = None if window is not None else attention.density
    rows = rows_of(
        attention.pattern.name, seq_len // block, causal=spec.causal, density=density, window=window, sinks=sinks
    )
    sizes = sizes_of(spec)
    dealt = str(spec.task_params.get("partition", "balanced"))
    joined = sizes.num_heads // sizes.num_kv_heads
    works = (
        estimate(rows, world, partition=dealt, block_size=block, heads=sizes.num_heads, heads_joined=joined)
        for world in (world_size, 1)
    )
    ring, alone = (predict(work, sizes, hardware) for work in works)
    return ring, alone


def _timed(row: RingRow) -> list[Timed]:
    """What one rank did with the whole sequence: the ring's own time where it is one rank, and the single process's."""
    record = row.record
    pairs = [(record.single_forward_ms_p50, record.single_forward_backward_ms_p50)]
    if row.world_size == 1:
        pairs.append((record.forward_ms_p50, record.forward_backward_ms_p50))
    timed = []
    for forward, both in pairs:
        if forward and both and both > forward:
            timed.append(Timed(row.alone, row.sizes, Pass.FORWARD, forward / 1e3))
            timed.append(Timed(row.alone, row.sizes, Pass.BACKWARD, (both - forward) / 1e3))
    return timed


def _has(row: RingRow) -> bool:
    return row.record.peak_bytes is not None
