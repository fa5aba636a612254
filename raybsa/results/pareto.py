"""What a search is after, and the records that no other record beats on all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raybsa.results.record import Record


@dataclass(frozen=True)
class Objective:
    """One thing to make small or large: a name for people, the column of a Record, and the goal."""

    name: str
    column: str
    goal: Literal["min", "max"] = "min"

    def value(self, record: Record) -> float | None:
        return getattr(record, self.column)


LATENCY = Objective("latency", "forward_backward_ms_p50")
FORWARD_LATENCY = Objective("forward_latency", "forward_ms_p50")
MEMORY = Objective("memory", "peak_bytes")
DENSITY = Objective("density", "density")
COSTS = {objective.name: objective for objective in (LATENCY, FORWARD_LATENCY, MEMORY, DENSITY)}


def quality_objective(goal: Literal["min", "max"]) -> Objective:
    """Quality has its goal from the task: bits per byte go down, accuracy goes up."""
    return Objective("quality", "quality", goal)


def named_objectives(names: Sequence[str], quality_goal: Literal["min", "max"] | None) -> list[Objective]:
    """Objectives by name: ``quality`` and the ``COSTS``.

    Raises:
        ValueError: an unknown name, one named twice, none, or ``quality`` of a task that has none (``quality_goal``).
    """
    known = COSTS | ({"quality": quality_objective(quality_goal)} if quality_goal else {})
    if not names or len(set(names)) < len(names) or set(names) - set(known):
        raise ValueError(f"objectives must be different ones of {sorted(known)}, got {list(names)}")
    return [known[name] for name in names]


def pareto_front(records: Sequence[Record], objectives: Sequence[Objective]) -> list[Record]:
    """The records that no other beats: none is at least as good in every objective and better in one.

    Records that failed or lack one of the objectives are left out. Equals all stay. Ordered by the first objective,
    the best first. O(n**2).
    """
    if not objectives:
        raise ValueError("a Pareto front needs at least one objective, got none")
    costs = [(record, cost) for record in records if (cost := _cost(record, objectives)) is not None]
    front = [(record, cost) for record, cost in costs if not any(_dominates(other, cost) for _, other in costs)]
    return [record for record, _ in sorted(front, key=lambda pair: pair[1])]


def _cost(record: Record, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    values = [objective.value(record) for objective in objectives]
    if record.status != "ok" or any(value is None or value != value for value in values):
        return None
    signs = [1.0 if objective.goal == "min" else -1.0 for objective in objectives]
    return tuple(sign * float(value) for sign, value in zip(signs, values, strict=True) if value is not None)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
