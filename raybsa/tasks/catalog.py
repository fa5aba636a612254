"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raybsa.spec import TrialSpec
from raybsa.tasks import byte_lm, recall
from raybsa.tasks.training import Training
from raybsa.timing import DeviceLock

Prepare = Callable[[TrialSpec, torch.device, DeviceLock], Training]

SPEED_ONLY = "speed"
TRAININGS: dict[str, Prepare] = {"byte_lm": byte_lm.prepare_training, "recall": recall.prepare_training}


def prepare_training(spec: TrialSpec, device: torch.device, lock: DeviceLock) -> Training | None:
    """What trains and evaluates for a task, not begun; None where only speed is asked for."""
    if spec.task != SPEED_ONLY and spec.task not in TRAININGS:
        raise ValueError(f"task must be one of {sorted([*TRAININGS, SPEED_ONLY])}, got {spec.task!r}")
    return TRAININGS[spec.task](spec, device, lock) if spec.task in TRAININGS else None
