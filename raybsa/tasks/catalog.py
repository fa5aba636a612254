"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raybsa.own import own
from raybsa.spec import TrialSpec
from raybsa.tasks import byte_lm, recall
from raybsa.tasks.training import Training
from raybsa.timing import DeviceLock

Prepare = Callable[[TrialSpec, torch.device, DeviceLock], Training]

SPEED_ONLY = "speed"
TRAININGS: dict[str, Prepare] = {"byte_lm": byte_lm.prepare_training, "recall": recall.prepare_training}


def prepare_training(spec: TrialSpec, device: torch.device, lock: DeviceLock) -> Training | None:
    """What trains and evaluates for a task, not begun; None where only speed is asked for."""
    if spec.task == SPEED_ONLY:
        return None
    prepare = TRAININGS[spec.task] if spec.task in TRAININGS else own(spec.task, "task", (*TRAININGS, SPEED_ONLY))
    return prepare(spec, device, lock)
