"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from raybsa.spec import TrialSpec
from raybsa.tasks import byte_lm, recall
from raybsa.tasks.training import Quality
from raybsa.timing import DeviceLock

Judge = Callable[[TrialSpec, torch.device, DeviceLock], Quality]

SPEED_ONLY = "speed"
JUDGES: dict[str, Judge] = {"byte_lm": byte_lm.judge, "recall": recall.judge}


def find_judge(task: str) -> Judge | None:
    """What trains and evaluates for ``task``; None where only speed is asked for."""
    if task != SPEED_ONLY and task not in JUDGES:
        raise ValueError(f"task must be one of {sorted([*JUDGES, SPEED_ONLY])}, got {task!r}")
    return JUDGES.get(task)
