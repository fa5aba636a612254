"""What a trial will cost, predicted from the trials that are measured already: milliseconds, bytes, seconds of work.

Attention: the linear model of ``ring.hardware`` (seconds = calls + active pairs + rows), fitted by direction and block
size to the search's own times on one device. Memory and training time follow from ratios and medians of the same rows.
Until there are rows enough nothing is predicted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import median

import numpy as np
import torch

from raybsa.layout import BlockLayout
from raybsa.results.record import Measurement, Record
from raybsa.ring.cost import Sizes, compute_seconds
from raybsa.ring.fitting import Timed, fit
from raybsa.ring.hardware import Hardware, Pass
from raybsa.ring.work import Work
from raybsa.spec import DENSE, TrialSpec
from raybsa.variants.source import layout_source

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
    """

    hardware: Hardware
    bytes_fixed: float
    bytes_a_pair: float
    step_seconds: float
    fixed_seconds: float

    @classmethod
    def learned(cls, records: Iterable[Record]) -> CostModel | None:
        """From measured trials of one device (the last one's); None where there are too few."""
        rows = [r for r in records if r.forward_ms_p50 and r.forward_backward_ms_p50 and r.variant == "base"]
        rows = [r for r in rows if (r.device_name, r.num_threads) == (rows[-1].device_name, rows[-1].num_threads)]
        rows = rows[-_MOST:]
        if len(rows) < ENOUGH:
            return None
        asked = [TrialSpec.from_dict(json.loads(row.spec)) for row in rows]
        hardware = fit(
            rows[-1].device_name, [call for s, r in zip(asked, rows, strict=True) for call in _timed(s, r)], []
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
            hardware, float(fixed), float(slope), max(0.0, median(steps or [0.0])), max(0.0, median(others or [0.0]))
        )

    def predict(self, spec: TrialSpec) -> Measurement:
        """Density, times and memory as a measurement would have them; nothing else is filled."""
        work = _work(spec, spec.seq_len)
        forward, backward = (self._seconds(work, spec, direction) for direction in Pass)
        return Measurement(
            density=float(np.mean([_layout(spec, i, spec.seq_len).density for i in range(len(spec.attention))])),
            forward_ms_p50=1e3 * forward,
            forward_backward_ms_p50=1e3 * (forward + backward),
            peak_bytes=round(self.bytes_fixed + self.bytes_a_pair * _area(spec)),
        )

    def trial_seconds(self, spec: TrialSpec) -> float:
        """Seconds of a worker for the whole trial."""
        a_step = self.step_seconds + _training_attention(spec, self.hardware)
        return self.fixed_seconds + spec.train_steps * a_step

    def _seconds(self, work: Work, spec: TrialSpec, direction: Pass) -> float:
        return spec.num_layers * float(compute_seconds(work, _sizes(spec), self.hardware, direction).sum())


def _timed(spec: TrialSpec, record: Record) -> list[Timed]:
    """One layer's forward and backward, in seconds."""
    assert record.forward_ms_p50
    assert record.forward_backward_ms_p50
    work, sizes = _work(spec, spec.seq_len), _sizes(spec)
    forward = record.forward_ms_p50 / 1e3 / spec.num_layers
    backward = max(1e-9, record.forward_backward_ms_p50 / 1e3 / spec.num_layers - forward)
    return [Timed(work, sizes, Pass.FORWARD, forward), Timed(work, sizes, Pass.BACKWARD, backward)]


def _training_attention(spec: TrialSpec, hardware: Hardware) -> float:
    """Seconds of the attention in one training step."""
    sizes = replace(_sizes(spec), batch=spec.task_params.get("train_batch", 8))
    work = _work(spec, spec.train_len)
    return spec.num_layers * sum(float(compute_seconds(work, sizes, hardware, p).sum()) for p in Pass)


def _layout(spec: TrialSpec, layer: int, length: int) -> BlockLayout:
    """The blocks of a layer; those of the dense baseline all, of a learned pattern as many as it keeps."""
    attention = spec.layer(layer)
    source = layout_source(
        attention.pattern or DENSE,
        None,
        None,
        density=attention.density,
        block_size=attention.block_size,
        causal=spec.causal,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        num_kv_heads=spec.num_kv_heads,
    )
    return source.layout(length, length, spec.num_heads, torch.device("cpu"))


@lru_cache(maxsize=1024)
def _work(spec: TrialSpec, length: int) -> Work:
    """The mean layer's work on one rank."""
    layouts = [_layout(spec, index, length) for index in range(len(spec.attention))]
    first, one = layouts[0], np.ones((1, 1))
    active = float(np.mean([layout.nnz_blocks / layout.num_groups for layout in layouts]))
    rows = float(first.num_q_blocks)
    sizes = (length, first.q_block_size, first.kv_block_size)
    return Work(*sizes, np.array([0]), active * one, rows * one, 0 * one, np.array([rows]))


def _area(spec: TrialSpec) -> float:
    """Kept (query, key) pairs of tokens of a head at the timed length."""
    work = _work(spec, spec.seq_len)
    return float(work.active.sum()) * work.q_block_size * work.kv_block_size


def _sizes(spec: TrialSpec) -> Sizes:
    kv_heads = spec.num_kv_heads or spec.num_heads
    return Sizes(spec.batch, spec.num_heads, kv_heads, spec.head_dim, getattr(torch, spec.dtype).itemsize)
