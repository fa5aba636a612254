"""A training whose driver is killed: it runs in a process of its own, and another one resumes it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import ray

from raybsa.cluster.faults import FaultPlan
from raybsa.cluster.journal import TrainingFailed, TrainingResult
from raybsa.cluster.member import MemberSettings
from raybsa.experiments.drill_ring import Ring
from raybsa.experiments.launch import cluster

_LIMIT_S = 300.0


def kill_and_resume(ring: Ring, steps: int, settings: MemberSettings, plan: FaultPlan) -> tuple[float, TrainingResult]:
    """Trains in a process that ``plan`` kills, then resumes in a second one; returns when the second could train (of
    ``time.time``), and what it led to.

    Raises:
        TrainingFailed: the first process ended in another way than by the fault, or the second without a result.
    """
    assert settings.checkpoints is not None
    answer = Path(settings.checkpoints).parent / "answer"
    first = _process(ring, steps, settings, plan, False, answer)
    if first != -signal.SIGKILL:
        raise TrainingFailed(f"a driver that is killed was wanted, it ended with status {first}")
    second = _process(ring, steps, settings, (), True, answer)
    if second != 0:
        raise TrainingFailed(f"the driver that resumes ended with status {second}")
    return pickle.loads(answer.read_bytes())


def _process(ring: Ring, steps: int, settings: MemberSettings, plan: FaultPlan, resume: bool, answer: Path) -> int:
    """Runs a driver to its end; returns its exit code."""
    arguments = (ray.get_runtime_context().gcs_address, ring, steps, settings, plan, resume, answer)
    process = multiprocessing.get_context("spawn").Process(target=_drive, args=arguments)
    process.start()
    process.join(_LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
        raise TrainingFailed(f"a driver did not end within {_LIMIT_S:g} s")
    return process.exitcode or 0


def _drive(
    address: str, ring: Ring, steps: int, settings: MemberSettings, plan: FaultPlan, resume: bool, answer: Path
) -> None:
    begun: list[float] = []

    def hear(text: str) -> None:
        if text.startswith(("resumed from", "no checkpoint")):
            begun.append(time.time())

    with (
        cluster(address, deaths=ring.verbose),
        ring.coordinator(steps, settings, plan, say=hear) as coordinator,
    ):
        result: Any = coordinator.run(evaluate=False, resume=resume, stretch=1)
    temporary = answer.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps((begun[0] if begun else time.time(), result)))
    os.replace(temporary, answer)
