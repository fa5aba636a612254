"""What a ring's trial will cost, from its plans: seconds by ``ring.cost``, bytes, and memory beside one rank's.

The formula knows kernels and links. What a ring's step takes beside them (agreeing on the call, hops that wait for
Python) is the median of what the search's own rings took beyond it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from statistics import median

import torch

from raybsa.experiments.forecast import sizes_of
from raybsa.gradients.catalog import build
from raybsa.gradients.codec import wide
from raybsa.results.record import Record, spec_of
from raybsa.ring.attention import payload_like
from raybsa.ring.cost import Prediction, predict
from raybsa.ring.hardware import Hardware
from raybsa.ring.work import Work, work_of
from raybsa.spec import TrialSpec
from raybsa.tasks.sharded_trial import plans_of

Seconds = tuple[float, float]  # forward, forward + backward


def step_seconds(spec: TrialSpec, hardware: Hardware, length: int | None = None, batch: int | None = None) -> Seconds:
    """The attention of all layers at ``length`` tokens (``seq_len``), by the formula alone."""
    layers = _layers(spec, hardware, length or spec.seq_len, batch or spec.batch)
    return sum(layer.forward_s for layer in layers), sum(layer.forward_backward_s for layer in layers)


def overhead(records: Iterable[Record], hardware: Hardware) -> Seconds:
    """What a step of these rings took beyond the formula, medians; nothing without rings."""
    beyond = []
    for record in records:
        spec = spec_of(record)
        if spec.is_current and spec.ranks.world_size > 1 and record.forward_ms_p50 and record.forward_backward_ms_p50:
            forward, both = step_seconds(spec, hardware)
            beyond.append((record.forward_ms_p50 / 1e3 - forward, record.forward_backward_ms_p50 / 1e3 - both))
    forward, both = (max(0.0, median(found)) for found in zip(*beyond, strict=True)) if beyond else (0.0, 0.0)
    return forward, both


def memory_share(spec: TrialSpec, hardware: Hardware) -> float:
    """Bytes of the fullest rank / those of one rank with the whole sequence, by the formula."""
    shared, whole = (_layers(one, hardware, spec.seq_len, spec.batch) for one in (spec, spec.alone))
    return max(layer.memory_bytes for layer in shared) / max(layer.memory_bytes for layer in whole)


def wire_bytes(spec: TrialSpec) -> int:
    """What all ranks send for the attention of all layers, forward and backward, as far as the plans say: exact without
    a codec for dK and dV; nothing of the weights' gradients."""
    sizes, codec = sizes_of(spec), build(spec.ranks.gradient_codec)
    total = 0.0
    for work in _works(spec, spec.seq_len):
        numbers = 2 * sizes.batch * sizes.num_kv_heads * work.kv_block_size * sizes.head_dim  # K and V of a block
        payload = payload_like(codec, (numbers,), wide(getattr(torch, spec.dtype)))
        total += float(work.received.sum()) * (2 * numbers * sizes.itemsize + codec.nbytes(payload))
    return round(total)


def _layers(spec: TrialSpec, hardware: Hardware, length: int, batch: int) -> list[Prediction]:
    return [predict(work, replace(sizes_of(spec), batch=batch), hardware) for work in _works(spec, length)]


@lru_cache(maxsize=1024)
def _works(spec: TrialSpec, length: int) -> tuple[Work, ...]:
    """Every layer's work on all ranks."""
    return tuple(work_of(plan) for plan in plans_of(spec, length))
