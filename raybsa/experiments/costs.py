"""What a trial will cost, predicted from the trials that are measured already: milliseconds, bytes, seconds of work.

Attention: the linear model of ``ring.hardware`` (seconds = calls + active pairs + rows), fitted by direction and block
size to the search's own times on one device. Memory and training time follow from ratios and medians of the same rows.
A ring's step follows from its plans (``ring_costs.py``), over a link that is fitted to messages that rings have timed
(free until they have). Until there are rows enough nothing is predicted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean, median

import numpy as np

from raybsa.experiments.forecast import messages_of, sizes_of
from raybsa.experiments.ring_costs import Seconds, memory_share, overhead, step_seconds, wire_bytes
from raybsa.results.record import Measurement, Record, SeriesPoint, finite, spec_of
from raybsa.ring.cost import compute_seconds
from raybsa.ring.fitting import Timed, fit
from raybsa.ring.hardware import Hardware, Pass
from raybsa.ring.work import Work
from raybsa.spec import TrialSpec
from raybsa.tasks.attention import layer_layout

ENOUGH = 5  # measured sparse trials before anything is predicted
_MOST = 100  # of them, the latest


@dataclass(frozen=True)
class CostModel:
    """Predictions for one device.

    Args:
        hardware: fitted to the device's times.
        bytes_a_pair, bytes_fixed: peak memory as a line over active pairs of blocks times their area.
        step_seconds: seconds of a training step beyond its attention.
        fixed_seconds: of a trial beyond its training: timing, evaluation, start.
        ring_seconds: (forward, forward + backward) of a ring's step beyond its formula.
    """

    hardware: Hardware
    bytes_fixed: float
    bytes_a_pair: float
    step_seconds: float
    fixed_seconds: float
    ring_seconds: Seconds = (0.0, 0.0)

    @classmethod
    def learned(cls, records: Iterable[Record], series: Iterable[SeriesPoint] = ()) -> CostModel | None:
        """From measured trials of one device (the last one's), and the messages in their rings' ``series``; None where
        there are too few."""
        records = list(map(finite, records))
        rows = [r for r in records if r.forward_ms_p50 and r.forward_backward_ms_p50 and r.variant == "base"]
        rows = [r for r in rows if spec_of(r).is_current]
        rows = [r for r in rows if (r.device_name, r.num_threads) == (rows[-1].device_name, rows[-1].num_threads)]
        rows = rows[-_MOST:]
        if len(rows) < ENOUGH:
            return None
        asked = [spec_of(row) for row in rows]
        here = {record.trial_id: record for record in records if record.device_name == rows[-1].device_name}
        hardware = fit(
            rows[-1].device_name,
            [call for s, r in zip(asked, rows, strict=True) for call in _timed(s, r)],
            messages_of(point for point in series if point.trial_id in here),
        )
        areas, peaks = [_area(spec) for spec in asked], [float(row.peak_bytes or 0) for row in rows]
        slope, fixed = np.polyfit(areas, peaks, 1) if len(set(areas)) > 1 else (0.0, median(peaks))
        steps = [
            row.train_seconds / row.trained_steps - _training_attention(spec, hardware)
            for spec, row in zip(asked, rows, strict=True)
            if row.train_seconds and row.trained_steps
        ]
        others = [row.worker_seconds - (row.train_seconds or 0.0) for row in rows if row.worker_seconds]
        return cls(
            hardware,
            float(fixed),
            float(slope),
            max(0.0, median(steps or [0.0])),
            max(0.0, median(others or [0.0])),
            overhead(list(here.values())[-_MOST:], hardware),
        )

    def predict(self, spec: TrialSpec) -> Measurement:
        """Density, times, memory and bytes on the wire as a measurement would have them; nothing else is filled."""
        if spec.ranks.world_size > 1:
            return self._predict_ring(spec)
        work = _work(spec, spec.seq_len)
        forward, backward = (self._seconds(work, spec, direction) for direction in Pass)
        return Measurement(
            density=_density(spec),
            forward_ms_p50=1e3 * forward,
            forward_backward_ms_p50=1e3 * (forward + backward),
            peak_bytes=round(self.bytes_fixed + self.bytes_a_pair * _area(spec)),
        )

    def trial_seconds(self, spec: TrialSpec) -> float:
        """Seconds of a worker, or of a ring, for the whole trial. Ranks share what a step takes beside its attention;
        the exchange of the weights' gradients is not counted."""
        ranks = spec.ranks.world_size
        a_step = self.step_seconds / ranks + _training_attention(spec, self.hardware)
        return self.fixed_seconds + spec.train_steps * (a_step + (self.ring_seconds[1] if ranks > 1 else 0.0))

    def _predict_ring(self, spec: TrialSpec) -> Measurement:
        forward, both = step_seconds(spec, self.hardware)
        whole = self.bytes_fixed + self.bytes_a_pair * _area(spec)
        return Measurement(
            density=_density(spec),
            forward_ms_p50=1e3 * (forward + self.ring_seconds[0]),
            forward_backward_ms_p50=1e3 * (both + self.ring_seconds[1]),
            peak_bytes=round(whole * memory_share(spec, self.hardware)),
            wire_bytes=wire_bytes(spec),
            world_size=spec.ranks.world_size,
        )

    def _seconds(self, work: Work, spec: TrialSpec, direction: Pass) -> float:
        return spec.num_layers * float(compute_seconds(work, sizes_of(spec), self.hardware, direction).sum())


def _density(spec: TrialSpec) -> float:
    return fmean(layer_layout(spec, index, spec.seq_len).density for index in range(len(spec.attention)))


def _timed(spec: TrialSpec, record: Record) -> list[Timed]:
    """One layer's forward and backward, in seconds."""
    assert record.forward_ms_p50
    assert record.forward_backward_ms_p50
    work, sizes = _work(spec, spec.seq_len), sizes_of(spec)
    forward = record.forward_ms_p50 / 1e3 / spec.num_layers
    backward = max(1e-9, record.forward_backward_ms_p50 / 1e3 / spec.num_layers - forward)
    return [Timed(work, sizes, Pass.FORWARD, forward), Timed(work, sizes, Pass.BACKWARD, backward)]


def _training_attention(spec: TrialSpec, hardware: Hardware) -> float:
    """Seconds of the attention in one training step."""
    batch = spec.task_params.get("train_batch", 8)
    if spec.ranks.world_size > 1:
        return step_seconds(spec, hardware, spec.train_len, batch)[1]
    sizes = replace(sizes_of(spec), batch=batch)
    work = _work(spec, spec.train_len)
    return spec.num_layers * sum(float(compute_seconds(work, sizes, hardware, p).sum()) for p in Pass)


@lru_cache(maxsize=1024)
def _work(spec: TrialSpec, length: int) -> Work:
    """The mean layer's work on one rank."""
    layouts = [layer_layout(spec, index, length) for index in range(len(spec.attention))]
    first, one = layouts[0], np.ones((1, 1))
    active = float(np.mean([layout.nnz_blocks / layout.num_groups for layout in layouts]))
    rows = float(first.num_q_blocks)
    sizes = (length, first.q_block_size, first.kv_block_size)
    return Work(*sizes, np.array([0]), active * one, rows * one, 0 * one, np.array([rows]))


def _area(spec: TrialSpec) -> float:
    """Kept (query, key) pairs of tokens of a head at the timed length."""
    work = _work(spec, spec.seq_len)
    return float(work.active.sum()) * work.q_block_size * work.kv_block_size
