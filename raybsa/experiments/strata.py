"""Early stopping that does not bias the front: successive halving on quality among trials of about equal density.

Sparse patterns are worse and faster than dense ones; halved together they would all be stopped, and the front would
lose its fast half. So each stratum of densities has an ASHA of its own (Li et al. 2018, arXiv:1810.05934; Ray Tune's),
and the dense baseline and each reference are alone in their own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from raybsa.experiments.history import Answered
from raybsa.experiments.layers import asked_density
from raybsa.experiments.space import REFERENCE, Config
from raybsa.results.record import SeriesPoint

STEPS, QUALITY = "trained_steps", "quality_so_far"  # keys of a trial's results
_PER_DECADE = 3  # strata in a factor of ten of density


class StratifiedHalving(FIFOScheduler):
    """Stops a trial whose quality at a rung is not among the best ``1 / factor`` of its stratum so far.

    Args:
        steps: of a whole training.
        goal: of the quality, ``"min"`` or ``"max"``.
        factor: between rungs, in steps and in trials.
        rungs: how often trials are compared before the end of their training: at ``1 / factor`` of it, and with more
            rungs at powers of that. Earlier ones mislead: what needs no attention is learned first.
    """

    def __init__(self, steps: int, goal: str, *, factor: int = 3, rungs: int = 1) -> None:
        super().__init__()
        self._steps, self._goal, self._factor = steps, goal, factor
        self._first = max(1, math.ceil(steps / factor**rungs))
        self._strata: dict[tuple[str, int], ASHAScheduler] = {}

    @property
    def rungs(self) -> list[int]:
        """Steps at which trials report, the last but the end of the training."""
        found, step = [], self._first
        while step < self._steps:
            found.append(step)
            step *= self._factor
        return found

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """A failed trial is no measure for the others."""
        self._of(trial).on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        return f"successive halving in {len(self._strata)} strata of density, rungs at {self.rungs} steps"

    def replay(self, earlier: Sequence[Answered], series: Sequence[SeriesPoint]) -> None:
        """Learns what trials of earlier runs had reached at the rungs."""
        rungs, reached = set(self.rungs), defaultdict[str, list[SeriesPoint]](list)
        for point in series:
            if point.step in rungs:
                reached[point.trial_id].append(point)
        for answered in earlier:
            record = answered.record
            trial = SimpleNamespace(trial_id=record.trial_id, config=answered.config)
            points = [p for p in reached[record.trial_id] if p.name == record.quality_name and math.isfinite(p.value)]
            self.on_trial_add(None, trial)
            for point in sorted(points, key=lambda point: point.step):
                self.on_trial_result(None, trial, {STEPS: point.step, QUALITY: point.value})
            self.on_trial_remove(None, trial)

    def _of(self, trial: Any) -> ASHAScheduler:
        key = stratum(trial.config)
        if key not in self._strata:
            self._strata[key] = ASHAScheduler(
                STEPS,
                QUALITY,
                self._goal,
                max_t=self._steps,
                grace_period=self._first,
                reduction_factor=self._factor,
            )
        return self._strata[key]


def stratum(config: Config) -> tuple[str, int]:
    """Equal for configurations of about equal density; of its own for the dense baseline and each reference."""
    density = asked_density(config)
    if density is None:
        return config["family"], config.get(REFERENCE, 0)
    return "density", math.floor(_PER_DECADE * math.log10(density))
