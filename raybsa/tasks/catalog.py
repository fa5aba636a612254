"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from raybsa.own import own
from raybsa.spec import TrialSpec
from raybsa.tasks import byte_lm, captured, recall
from raybsa.tasks.training import Quality
from raybsa.timing import DeviceLock


class Judgement(Protocol):
    """What comes to a trial's quality: a Training, or what needs none."""

    def advance(self, step: int | None = None) -> Quality:
        """The quality after so many training steps; None: after all."""


Prepare = Callable[[TrialSpec, torch.device, DeviceLock], Judgement]

SPEED_ONLY = "speed"
TRAININGS: dict[str, Prepare] = {
    "byte_lm": byte_lm.prepare_training,
    "recall": recall.prepare_training,
    "captured": captured.prepare_judgement,
}


def prepare_training(spec: TrialSpec, device: torch.device, lock: DeviceLock) -> Judgement | None:
    """What trains and evaluates for a task, not begun; None where only speed is asked for."""
    if spec.task == SPEED_ONLY:
        return None
    prepare = TRAININGS[spec.task] if spec.task in TRAININGS else own(spec.task, "task", (*TRAININGS, SPEED_ONLY))
    return prepare(spec, device, lock)
