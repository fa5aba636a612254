"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from raybsa.own import own
from raybsa.spec import MODULE, WEIGHTS, TrialSpec
from raybsa.tasks import byte_lm, captured, module, recall
from raybsa.tasks.preview import Preview
from raybsa.tasks.speed import OwnAttention
from raybsa.tasks.training import Quality, Training
from raybsa.timing import DeviceLock


class Judgement(Protocol):
    """What comes to a trial's quality: a Training, or what needs none."""

    @property
    def attention(self) -> OwnAttention | None:
        """What the trial times; None: the spec's attention on synthetic q, k, v."""

    def advance(self, step: int | None = None) -> Quality:
        """The quality after so many training steps; None: after all."""


Prepare = Callable[[TrialSpec, torch.device, DeviceLock], Judgement]

SPEED_ONLY = "speed"
TRAININGS: dict[str, Prepare] = {
    "byte_lm": byte_lm.prepare_training,
    "recall": recall.prepare_training,
    "captured": captured.prepare_judgement,
    MODULE: module.prepare_training,
}


def prepare_training(spec: TrialSpec, device: torch.device, lock: DeviceLock) -> Judgement | None:
    """What trains and evaluates for a task, not begun; None where only speed is asked for.

    Raises:
        ValueError: an unknown task, or a preview of one that is no Training.
    """
    if spec.weights is not None:
        alone = spec.alone  # whoever shares it, one worker can look at it
        plain = {name: value for name, value in alone.task_params.items() if name != WEIGHTS}
        training = prepare_training(replace(alone, task_params=plain), device, lock)
        if not isinstance(training, Training):
            raise ValueError(f"only what is trained can be previewed, got task {spec.task!r}")
        return Preview(training, spec.weights)
    if spec.task == SPEED_ONLY:
        return None
    prepare = TRAININGS[spec.task] if spec.task in TRAININGS else own(spec.task, "task", (*TRAININGS, SPEED_ONLY))
    return prepare(spec, device, lock)
