"""Previews: a search looks at many questions and trains the few that promise most.

A preview is a question's quality with the dense baseline's weights (tasks/preview.py): one evaluation, no training, no
timing. Of the questions that were looked at, that one is trained next which adds most hypervolume to the front of those
trained already, where all count by their previews; so an early front is spread out, and none is trained because it came
first. Costs are the cost model's; until it has seen enough, a question's density stands for each of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raybsa.experiments.costs import CostModel
from raybsa.experiments.space import Config, SearchSpace
from raybsa.results.hypervolume import Point, hypervolume
from raybsa.results.pareto import Objective
from raybsa.results.record import Measured, Measurement, finite
from raybsa.spec import ADAPTIVE, DENSE, WEIGHTS, TrialSpec

PREVIEW = "preview"  # in a configuration: the file of weights
LOOKED = "a preview: judged with the dense baseline's weights, not trained"
NOISE = 0.002  # of a quality: what is trained must be beaten by so much less before the others count as beaten
_EDGE = 1.1  # of the range: the reference point of the hypervolume
_IN_VAIN = 20  # rounds of previews without one that promises anything


@dataclass
class _Seen:
    """A question that was looked at."""

    config: Config
    spec: TrialSpec
    quality: float
    density: float
    trained: bool


class Previews:
    """What was looked at, and what to train of it.

    Args:
        objectives: of the search; quality is one of them.
        weights: the dense baseline's, a file that may not be there yet.
        each: previews for one training.
        model: the cost model of the moment.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        weights: str,
        each: int,
        model: Callable[[], CostModel | None],
    ) -> None:
        self._space, self._objectives, self._weights, self._each, self._model = space, objectives, weights, each, model
        self._seen: dict[str, _Seen] = {}
        self._since = 0

    def __len__(self) -> int:
        return len(self._seen)

    def of(self, config: Config) -> Config | None:
        """The preview of a configuration; None where it has none: nothing to borrow yet, or its own to learn."""
        fixed = "density" not in config or ADAPTIVE in config.values()
        return None if fixed or not os.path.exists(self._weights) else config | {PREVIEW: self._weights}

    def learn(self, config: Config, measured: Measured) -> list[float] | None:
        """Takes a finished preview, or the trained baseline, which is its own; returns the objectives' values that it
        stands for, None where one of them cannot be said yet."""
        spec, measured = self._space.spec(config), finite(measured)
        if measured.quality is None or measured.density is None:
            return None
        seen = _Seen(config, spec, measured.quality, measured.density, trained=config["family"] == DENSE)
        self._seen[spec.digest] = seen
        self._since += not seen.trained
        values = self._values(seen)
        return None if None in values else [value for value in values if value is not None]

    def was_trained(self, spec: TrialSpec) -> bool:
        """Counts a question as trained; whether it was looked at before."""
        if seen := self._seen.get(spec.digest):
            seen.trained = True
        return seen is not None

    def due(self) -> Config | None:
        """What to train now; None where more is to be looked at first."""
        return self.best() if self._since >= self._each else None

    @property
    def in_vain(self) -> bool:
        """Whether nothing that was looked at for long promises anything."""
        return self._since >= self._each * _IN_VAIN

    def best(self) -> Config | None:
        """The question that promises most, from now on counted as trained; None where all are beaten already."""
        known = list(self._seen.values())
        scaled = self._scaled(known)
        front = [worse for seen, (_, worse) in zip(known, scaled, strict=True) if seen.trained]
        edge = (_EDGE,) * len(self._objectives)
        before, gains = hypervolume(front, edge), list[tuple[float, int]]()
        for number, (seen, (point, _)) in enumerate(zip(known, scaled, strict=True)):
            if not seen.trained and not any(_covers(other, point) for other in front):
                gains.append((hypervolume([*front, point], edge) - before, -number))
        if not gains or max(gains)[0] <= 0:
            return None
        chosen = known[-max(gains)[1]]
        chosen.trained, self._since = True, 0
        return chosen.config

    def _scaled(self, known: Sequence[_Seen]) -> list[tuple[Point, Point]]:
        """Each question's point, all to be minimised, and the point with its quality worse by the noise."""
        points, noisy = [self._point(seen, 0.0) for seen in known], [self._point(seen, NOISE) for seen in known]
        low, high = (tuple(map(best, zip(*points, strict=True))) for best in (min, max))

        def scale(point: Point) -> Point:
            return tuple((x - a) / (b - a or 1.0) for x, a, b in zip(point, low, high, strict=True))

        return [(scale(point), scale(worse)) for point, worse in zip(points, noisy, strict=True)]

    def _point(self, seen: _Seen, worse: float) -> Point:
        """Costs by their logarithm, qualities as they are."""
        point = []
        for objective, value in zip(self._objectives, self._values(seen), strict=True):
            sign = 1 if objective.goal == "min" else -1
            if objective.column == "quality":
                point.append(sign * seen.quality + abs(seen.quality) * worse)
            else:
                point.append(sign * math.log(max(value or seen.density, 1e-12)))
        return tuple(point)

    def _values(self, seen: _Seen) -> list[float | None]:
        """The objectives' values: the preview's quality and density, other costs as predicted."""
        known = Measurement(quality=seen.quality, density=seen.density)
        model = self._model()
        if model and any(objective.value(known) is None for objective in self._objectives):
            predicted = model.predict(seen.spec)
            known = replace(predicted, quality=seen.quality, density=seen.density)
        return [objective.value(known) for objective in self._objectives]


def preview_of(spec: TrialSpec, weights: str) -> TrialSpec:
    """The question's preview."""
    return replace(spec, task_params={**spec.task_params, WEIGHTS: weights})


def previewed(spec: TrialSpec) -> TrialSpec:
    """The question that a preview is of. Undoes ``preview_of``."""
    return replace(spec, task_params={name: value for name, value in spec.task_params.items() if name != WEIGHTS})


def _covers(a: Point, b: Point) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))
