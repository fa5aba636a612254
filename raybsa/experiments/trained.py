"""A training over ranks as rows: its record, its loss curve, and its recoveries on a time line."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

import torch

from raybsa.cluster.journal import Recovery, TrainingResult
from raybsa.cluster.member import MemberSettings
from raybsa.cluster.metrics import count_trial
from raybsa.experiments.recording import Run, announce, record_of
from raybsa.results.record import Measurement, Outcome, Record, SeriesPoint
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from raybsa.tasks.attention import layer_density
from raybsa.tasks.goals import QUALITIES


def write_training(
    store: Store,
    run: Run,
    number: int,
    spec: TrialSpec,
    settings: MemberSettings,
    device: str,
    result: TrainingResult,
    struck_at: Mapping[int, float] | None = None,
) -> Record:
    """Writes the record of a run's ``number``-th training and its series; returns the record.

    Series: ``train_loss`` (nats a token a step), ``applied_at`` (when each step was applied), and for the n-th
    recovery, at step n: ``recovery_struck_at`` (where ``struck_at`` says so, by generation), ``recovery_noticed_at``,
    ``recovery_filled_at``, ``recovery_formed_at``, ``recovery_resumed_at``, ``recovery_step`` and
    ``recovery_world_size``. Times are seconds of ``time.time``.
    """
    density = sum(layer_density(spec, index) for index in range(spec.num_layers)) / spec.num_layers
    name, goal = QUALITIES["byte_lm"]
    measurement = Measurement(
        density=density,
        quality_name=name,
        quality_goal=goal,
        quality=result.bits_per_byte,
        train_seconds=result.train_seconds,
        wire_bytes=sum(result.sent.values()),
        world_size=result.world_size,
        device=device,
        num_threads=settings.num_threads,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
    )
    trial_id = run.trial_id(number)
    record = record_of(Outcome(spec, measurement, None, len(result.recoveries)), run, trial_id)
    store.write_series([*_steps(trial_id, result), *_recoveries(trial_id, result.recoveries, struck_at or {})])
    store.write_record(record)
    announce(record)
    count_trial(record)
    return record


def _steps(trial_id: str, result: TrainingResult) -> Iterator[SeriesPoint]:
    for step, loss in result.losses.items():
        yield SeriesPoint(trial_id, "train_loss", step, 0, loss)
    for step, at in result.applied_at.items():
        yield SeriesPoint(trial_id, "applied_at", step, 0, at)


def _recoveries(
    trial_id: str, recoveries: tuple[Recovery, ...], struck_at: Mapping[int, float]
) -> Iterator[SeriesPoint]:
    for number, recovery in enumerate(recoveries):
        if recovery.generation in struck_at:
            yield SeriesPoint(trial_id, "recovery_struck_at", number, 0, struck_at[recovery.generation])
        for name in ("noticed_at", "filled_at", "formed_at", "resumed_at", "step", "world_size"):
            yield SeriesPoint(trial_id, f"recovery_{name}", number, 0, float(getattr(recovery, name)))
