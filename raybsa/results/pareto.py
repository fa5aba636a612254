"""What a search is after, and the records that no other record beats on all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raybsa.results.record import Measured, Record


@dataclass(frozen=True)
class Objective:
    """One thing to make small or large: a name for people, the column of a Record, the goal, and where it must lie.

    ``least`` and ``most`` bound it, both included; None is no bound.
    """

    name: str
    column: str
    goal: Literal["min", "max"] = "min"
    least: float | None = None
    most: float | None = None

    def value(self, record: Measured) -> float | None:
        """None where it was not measured, or is infinite or not a number."""
        value = getattr(record, self.column)
        return value if value is None or math.isfinite(value) else None

    def excess(self, value: float) -> float:
        """By how much a value breaks the bounds; 0 or less where it keeps them."""
        under = -math.inf if self.least is None else self.least - value
        over = -math.inf if self.most is None else value - self.most
        return max(under, over)

    @property
    def is_bounded(self) -> bool:
        return self.least is not None or self.most is not None

    def __str__(self) -> str:
        bounds = [f" {sign} {bound:g}" for sign, bound in ((">=", self.least), ("<=", self.most)) if bound is not None]
        turned = ":max" if self.goal == "max" and self.column != "quality" else ""
        return f"{self.name}{turned}{''.join(bounds)}"


LATENCY = Objective("latency", "forward_backward_ms_p50")
FORWARD_LATENCY = Objective("forward_latency", "forward_ms_p50")
MEMORY = Objective("memory", "peak_bytes")
DENSITY = Objective("density", "density")
WIRE = Objective("wire", "wire_bytes")
COSTS = {objective.name: objective for objective in (LATENCY, FORWARD_LATENCY, MEMORY, DENSITY, WIRE)}

_FORM = re.compile(r"(?P<name>\w+)(:(?P<goal>min|max))?\s*((?P<side><=|>=)\s*(?P<bound>[0-9.eE+-]+)\s*(?P<unit>\w*))?")
_UNITS = {"": 1.0, "ms": 1.0, "s": 1e3, "B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}


def quality_objective(goal: Literal["min", "max"]) -> Objective:
    """Quality has its goal from the task: bits per byte go down, accuracy goes up."""
    return Objective("quality", "quality", goal)


def named_objectives(texts: Sequence[str], quality_goal: Literal["min", "max"] | None) -> list[Objective]:
    """Objectives from texts: ``quality`` and the ``COSTS`` by name, each with a direction of its own where given
    (``density:max``) and a bound (``latency<=2ms``, ``memory<=64MiB``, ``quality>=0.9``).

    Raises:
        ValueError: an unknown name, one named twice, none, a text of another form, or ``quality`` of a task that has
            none (``quality_goal``).
    """
    known = COSTS | ({"quality": quality_objective(quality_goal)} if quality_goal else {})
    found = [_FORM.fullmatch(text.strip()) for text in texts]
    names = [match["name"] if match else "" for match in found]
    if not names or len(set(names)) < len(names) or set(names) - set(known):
        raise ValueError(f"objectives must be different ones of {sorted(known)}, got {list(texts)}")
    return [_objective(known[match["name"]], match) for match in found if match]


def _objective(plain: Objective, match: re.Match[str]) -> Objective:
    goal: Literal["min", "max"] = "max" if (match["goal"] or plain.goal) == "max" else "min"
    if match["side"] is None:
        return replace(plain, goal=goal)
    if match["unit"] not in _UNITS:
        raise ValueError(f"a bound's unit must be one of {list(_UNITS)}, got {match['unit']!r}")
    bound = float(match["bound"]) * _UNITS[match["unit"]]
    return replace(plain, goal=goal, most=bound) if match["side"] == "<=" else replace(plain, goal=goal, least=bound)


def pareto_front(records: Sequence[Record], objectives: Sequence[Objective]) -> list[Record]:
    """The records that no other beats: none is at least as good in every objective and better in one.

    Records that are not ok, lack one of the objectives or break a bound are left out. Equals all stay. Ordered by the
    first objective, the best first. O(n · front).
    """
    if not objectives:
        raise ValueError("a Pareto front needs at least one objective, got none")
    costs = [(record, cost) for record in records if (cost := _cost(record, objectives)) is not None]
    front: list[tuple[Record, tuple[float, ...]]] = []
    for record, cost in sorted(costs, key=lambda pair: pair[1]):  # who dominates sorts before whom it dominates
        if not any(_dominates(other, cost) for _, other in reversed(front)):  # the last one beats most
            front.append((record, cost))
    return [record for record, _ in front]


def _cost(record: Record, objectives: Sequence[Objective]) -> tuple[float, ...] | None:
    if record.status != "ok":
        return None
    cost = []
    for objective in objectives:
        value = objective.value(record)
        if value is None or objective.excess(value) > 0:
            return None
        cost.append(float(value) if objective.goal == "min" else -float(value))
    return tuple(cost)


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))
