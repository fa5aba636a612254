"""Schedule: a number that changes with training: dense warm-up, then annealed. Stepped by the trainer."""

from __future__ import annotations

from typing import Any

from torch import nn


class Schedule(nn.Module):
    """``start`` for ``warmup`` steps, then on to ``end`` in ``anneal`` steps, by equal factors.

    In ``eval`` mode it is ``end``: what the model is trained for. The step is part of ``state_dict``.

    Args:
        start, end: positive.
        warmup, anneal: steps.
        levels: how many values lie on the way; a density that stays for some steps needs no new layout shape in each.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, start: float, end: float, warmup: int = 0, anneal: int = 0, levels: int = 8) -> None:
        super().__init__()
        if start <= 0 or end <= 0 or warmup < 0 or anneal < 0 or levels < 1:
            raise ValueError(
                "a schedule takes positive values, steps from 0 on and at least one level, got "
                f"start={start!r}, end={end!r}, warmup={warmup!r}, anneal={anneal!r}, levels={levels!r}"
            )
        self.start, self.end, self.warmup, self.anneal, self.levels = float(start), float(end), warmup, anneal, levels
        self.count = 0

    @classmethod
    def constant(cls, value: float) -> Schedule:
        return cls(value, value)

    @property
    def value(self) -> float:
        """The number now."""
        if not self.training or self.count >= self.warmup + self.anneal:
            return self.end
        if self.count < self.warmup:
            return self.start
        level = 1 + (self.count - self.warmup) * self.levels // self.anneal
        return self.start * (self.end / self.start) ** (level / (self.levels + 1))

    def step(self) -> None:
        """One step of training was applied."""
        self.count += 1

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    def extra_repr(self) -> str:
        if self.start == self.end:
            return f"{self.end:g}"
        return f"{self.start:g} -> {self.end:g}, warmup={self.warmup}, anneal={self.anneal}, at step {self.count}"
