"""Record: the answer to a TrialSpec. One instance is one Parquet row; the fields' order is the columns' order."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from raybsa.spec import TrialSpec

SCHEMA_VERSION = 1
QUESTION, MACHINE, UNKNOWN = "question", "machine", "unknown"  # whose fault a failure is


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Whose answer a Record is, and to which question.

    ``status`` is ``"ok"``, ``"failed"``, ``"pruned"`` where a search stopped the trial early (its quality is that of
    ``trained_steps`` steps), or ``"refused"`` for a library that says it cannot serve what was asked; where it is not
    ok, ``error`` says why. ``created_at`` is UTC, ISO 8601.
    """

    trial_id: str
    run_id: str
    job: str
    created_at: str
    status: str
    error: str | None
    spec: str
    spec_hash: str
    seed: int

    task: str
    variant: str
    pattern: str
    block_size: int
    seq_len: int
    train_len: int | None
    batch: int
    num_heads: int
    head_dim: int
    causal: bool
    dtype: str
    backend: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What only the worker can know. Times are milliseconds, sizes bytes; None means not measured.

    ``worker_seconds`` is all that the trial took of its worker (of each of a ring's), waits for a neighbour that was
    timing included; ``train_seconds`` is the part that trained.
    ``peak_bytes`` is what forward and backward need beyond their inputs. ``quality_goal`` is ``"min"`` or ``"max"``.
    ``dense_*`` are torch SDPA's on the same shapes, measured in the same run on the same device; the share of the ideal
    speed-up is ``dense / (density * own)``. ``error_*`` are relative errors (max abs difference / max abs reference)
    against the float64 reference.

    A ring's row (task ``"ring"``) has the ranks' own times (the slowest rank's, ``world_size`` ranks on ``devices``
    cores or GPUs), ``single_*``: one process with the whole sequence, in turn with them, and the errors against it.
    ``wire_bytes`` are what all ranks sent in forward and backward, ``wire_forward_bytes`` in the forward,
    ``needed_forward_bytes`` what had to travel at least; ``imbalance`` is max / mean of the ranks' active blocks. A
    search's trial on several ranks has the same of all layers, without ``single_*``, and its ``wire_bytes`` hold the
    weights' gradients of a training step too.

    A row of task ``"ring_peers"`` has the same times of another library (``backend``; whose bytes nobody counted), with
    errors against float32 on a small case of its question; one of ``"ring_longest"`` says whether a step of ``seq_len``
    tokens fitted into the ranks' memory.

    A row of task ``"peers"`` is one library's kernels (``backend``; ``library`` with its version) on one layout, timed
    in turn with the others; ``dense_*`` are cuDNN's dense attention. Its errors are those of sampled rows against
    float32, ``reference_error_*`` what plain torch operations in the row's dtype make of the same. ``*_host_ms``: until
    a call returns to Python; ``layout_ms``: what the first call with a new layout costs more; ``layout_bytes``: what
    stays with the layout after it. ``capability`` is the GPU's architecture, as ``"sm_90"``.
    """

    density: float | None = None

    quality_name: str | None = None
    quality_goal: str | None = None
    quality: float | None = None
    train_seconds: float | None = None
    trained_steps: int | None = None

    forward_ms_p20: float | None = None
    forward_ms_p50: float | None = None
    forward_ms_p80: float | None = None
    forward_backward_ms_p20: float | None = None
    forward_backward_ms_p50: float | None = None
    forward_backward_ms_p80: float | None = None
    dense_forward_ms_p50: float | None = None
    dense_forward_backward_ms_p50: float | None = None
    peak_bytes: int | None = None
    dense_peak_bytes: int | None = None
    wire_bytes: int = 0
    wire_forward_bytes: int | None = None
    needed_forward_bytes: int | None = None
    world_size: int | None = None
    devices: int | None = None
    partition: str | None = None
    imbalance: float | None = None
    single_forward_ms_p50: float | None = None
    single_forward_backward_ms_p50: float | None = None
    error_forward: float | None = None
    error_gradient: float | None = None
    reference_error_forward: float | None = None
    reference_error_gradient: float | None = None

    forward_host_ms: float | None = None
    forward_backward_host_ms: float | None = None
    layout_ms: float | None = None
    layout_bytes: int | None = None
    library: str = ""
    capability: str = ""

    device: str = ""
    device_name: str = ""
    num_threads: int | None = None
    torch_version: str = ""
    python_version: str = ""
    worker_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement(Measured):
    """What a worker sends up: its part of a Record, and the curves: (name, step, value), or (name, step, rank, value)
    where ranks have their own."""

    curves: tuple[tuple[str, int, float], ...] = ()
    rank_curves: tuple[tuple[str, int, int, float], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: with a measurement or with an error. ``failures`` counts the workers that died under it;
    ``pruned`` says why a trial was stopped before its training was done; ``cause`` says whose fault an error is:
    ``QUESTION``, ``MACHINE`` or ``UNKNOWN``."""

    spec: TrialSpec
    measurement: Measurement | None
    error: str | None
    failures: int
    pruned: str | None = None
    cause: str | None = None


@dataclass(frozen=True, kw_only=True)
class Record(Measured, Asked):  # the fields of the last base come first
    """What was asked and what one trial measured, with what the job adds. ``error_cause`` of a failed trial is whose
    fault that is: ``"question"`` (it would fail anywhere), ``"machine"`` (disk, permissions, memory, time, room) or
    ``"unknown"``."""

    failures_survived: int = 0
    ray_version: str = ""
    raybsa_version: str = ""
    git_commit: str = ""
    error_cause: str | None = None
    schema_version: int = SCHEMA_VERSION


M = TypeVar("M", bound=Measured)


def spec_of(record: Record) -> TrialSpec:
    """The question that a record answers.

    Raises:
        ValueError: it cannot be read, because it is damaged or a newer version asked it; the message names the trial.
    """
    try:
        return TrialSpec.from_dict(json.loads(record.spec))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the spec of trial {record.trial_id} cannot be read: {error}") from error


def not_finite(measured: Measured) -> dict[str, float]:
    """What was measured as infinite or not a number: a training that diverged, a time that was none."""
    found = {name: getattr(measured, name) for name in _FLOATS}
    return {name: value for name, value in found.items() if value is not None and not math.isfinite(value)}


def finite(measured: M) -> M:
    """The same without what is not finite, as if that had not been measured."""
    odd: dict[str, Any] = dict.fromkeys(not_finite(measured))
    return replace(measured, **odd) if odd else measured


def efficiencies(record: Record) -> tuple[float | None, float | None]:
    """(forward, forward + backward) of a ring: one process's time / (ranks × the ring's); None where not measured."""

    def share(alone: float | None, own: float | None) -> float | None:
        return alone / (record.world_size * own) if alone and own and record.world_size else None

    return (
        share(record.single_forward_ms_p50, record.forward_ms_p50),
        share(record.single_forward_backward_ms_p50, record.forward_backward_ms_p50),
    )


@dataclass(frozen=True)
class SeriesPoint:
    """One point of a curve or timeline: a row of the long table beside the records."""

    trial_id: str
    name: str
    step: int
    rank: int
    value: float


_FLOATS = [field.name for field in fields(Measured) if field.type == "float | None"]
