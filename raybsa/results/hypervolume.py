"""How good a whole front is: the volume between it and a point that all of it beats.

Zitzler and Thiele (1999), "Multiobjective evolutionary algorithms": the one common measure that no worse front has
more of. Objectives are brought to one scale first, so that fronts of one question can be compared in one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from raybsa.results.pareto import Objective, pareto_front
from raybsa.results.record import Record

Point = tuple[float, ...]
_MARGIN = 0.1  # of the range: the ends of a front count too


class Scale:
    """The common scale of some fronts: 0 is the best value of any of their points, 1 the worst.

    Costs count by their logarithm, qualities as they are.

    Args:
        fronts: records that are to be compared.

    Raises:
        ValueError: no record has all the objectives and keeps their bounds.
    """

    def __init__(self, fronts: Sequence[Sequence[Record]], objectives: Sequence[Objective]) -> None:
        self._objectives = objectives
        points = [self._point(record) for front in fronts for record in pareto_front(front, objectives)]
        if not points:
            names = ", ".join(map(str, objectives))
            raise ValueError(f"finished trials with {names} were wanted to compare fronts, found none")
        self._low = [min(column) for column in zip(*points, strict=True)]
        self._high = [max(column) for column in zip(*points, strict=True)]

    def volume(self, records: Sequence[Record]) -> float:
        """The hypervolume of the front of ``records``, as a share of the box that holds all the fronts, in [0, 1]."""
        points = [self._scaled(self._point(record)) for record in pareto_front(records, self._objectives)]
        sides = len(self._objectives)
        return hypervolume(points, (1 + _MARGIN,) * sides) / (1 + _MARGIN) ** sides

    def _point(self, record: Record) -> Point:
        return tuple(_cost(objective, objective.value(record)) for objective in self._objectives)

    def _scaled(self, point: Point) -> Point:
        edges = zip(point, self._low, self._high, strict=True)
        return tuple((value - low) / (high - low or 1.0) for value, low, high in edges)


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume of all that some point is at least as good as, up to ``reference``; every coordinate is minimised.

    Sliced along the first coordinate: between two neighbours it is the volume of those before, one dimension lower.
    """
    inside = sorted(p for p in points if all(x < edge for x, edge in zip(p, reference, strict=True)))
    if not inside or not reference:
        return float(bool(inside))
    ends = [*(point[0] for point in inside[1:]), reference[0]]
    return sum(
        (end - point[0]) * hypervolume([other[1:] for other in inside[: rank + 1]], reference[1:])
        for rank, (point, end) in enumerate(zip(inside, ends, strict=True))
        if end > point[0]
    )


def _cost(objective: Objective, value: float | None) -> float:
    assert value is not None
    scaled = value if objective.column == "quality" else math.log(max(value, 1e-12))
    return scaled if objective.goal == "min" else -scaled
