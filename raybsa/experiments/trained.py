"""A training over ranks as rows: its record, its loss curve, and its recoveries on a time line."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch

from raybsa.cluster.member import MemberSettings
from raybsa.cluster.training import Recovery, TrainingResult
from raybsa.experiments.recording import Run, record_of
from raybsa.results.record import Measurement, Outcome, Record, SeriesPoint
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from raybsa.tasks.attention import layer_density
from raybsa.tasks.goals import QUALITIES


def write_training(
    store: Store, run: Run, number: int, spec: TrialSpec, settings: MemberSettings, device: str, result: TrainingResult
) -> Record:
    """Writes the record of a run's ``number``-th training and its series; returns the record.

    Series: ``train_loss`` (nats a token a step), and for the n-th recovery, at step n: ``recovery_noticed_at`` and
    ``recovery_resumed_at`` (seconds of ``time.time``), ``recovery_step`` and ``recovery_world_size``.
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
    trial_id = f"{run.run_id}-{number:03d}"
    record = record_of(Outcome(spec, measurement, None, len(result.recoveries)), run, trial_id)
    store.write_series([*_losses(trial_id, result), *_recoveries(trial_id, result.recoveries)])
    store.write_record(record)
    return record


def _losses(trial_id: str, result: TrainingResult) -> Iterator[SeriesPoint]:
    for step, loss in result.losses.items():
        yield SeriesPoint(trial_id, "train_loss", step, 0, loss)


def _recoveries(trial_id: str, recoveries: tuple[Recovery, ...]) -> Iterator[SeriesPoint]:
    for number, recovery in enumerate(recoveries):
        for name in ("noticed_at", "resumed_at", "step", "world_size"):
            yield SeriesPoint(trial_id, f"recovery_{name}", number, 0, float(getattr(recovery, name)))
