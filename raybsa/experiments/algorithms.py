"""How a search finds its next question: Optuna's samplers, or a list. All are asked, and told what came."""

from __future__ import annotations

import math
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from raybsa.experiments.space import Config, SearchSpace
from raybsa.results.pareto import Objective
from raybsa.spec import canonical_json

Values = Sequence[float] | None
_STUCK = 20  # refused configurations in a row
_CHANCE = 0x6A09E667


class Algorithm(Protocol):
    """Asks for configurations and learns from answers; None as values says that there was no answer."""

    def ask(self, refused: int = 0) -> Config | None:
        """The next configuration, after so many in a row that were not worth a trial; None where there are no more."""

    def tell(self, config: Config, values: Values) -> None:
        """The objectives' values of a configuration, of this run or an earlier one."""


class Listed:
    """Configurations in order; learns nothing."""

    def __init__(self, configs: Iterable[Config]) -> None:
        self._configs = iter(configs)

    def ask(self, refused: int = 0) -> Config | None:
        return next(self._configs, None)

    def tell(self, config: Config, values: Values) -> None:
        pass


class Sampled:
    """The space's openings, then what an Optuna sampler draws.

    Args:
        objectives: their goals and bounds are the study's.
        seed: of chance, which must not draw again what a random sampler of this seed drew.
    """

    def __init__(
        self, space: SearchSpace, objectives: Sequence[Objective], sampler: BaseSampler, seed: int = 0
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._objectives, self._sampler = space, objectives, sampler
        self._chance = RandomSampler(seed=_CHANCE ^ seed)
        way = {"min": optuna.study.StudyDirection.MINIMIZE, "max": optuna.study.StudyDirection.MAXIMIZE}
        self._study = optuna.create_study(directions=[way[objective.goal] for objective in objectives], sampler=sampler)
        self._first = deque(space.openings())
        self._open: dict[str, optuna.Trial] = {}

    def ask(self, refused: int = 0) -> Config | None:
        """A sampler that keeps coming back to what is known already gives way to chance."""
        if self._first:
            return self._first.popleft()
        self._study.sampler = self._chance if refused >= _STUCK else self._sampler
        trial = self._study.ask()
        config = self._space.draw(trial)
        self._open[canonical_json(config)] = trial
        return config

    def tell(self, config: Config, values: Values) -> None:
        """A fixed point draws nothing and is not told: samplers look for the parameters that all trials have."""
        if "density" not in config:
            return
        if values is not None and not all(map(math.isfinite, values)):
            values = None
        bounds = [] if values is None else zip(self._objectives, values, strict=True)
        broken = {objective.name: objective.excess(value) for objective, value in bounds if objective.is_bounded}
        trial = self._open.pop(canonical_json(config), None)
        if trial is not None:
            for name, excess in broken.items():
                trial.set_constraint(name, excess)
            self._study.tell(trial, values, TrialState.FAIL if values is None else None)
        elif values is not None:
            distributions = self._space.distributions(config)
            self._study.add_trial(
                optuna.create_trial(params=config, distributions=distributions, values=values, constraints=broken)
            )


def _sampled(make: Callable[[int, int], BaseSampler]) -> Callable[..., Algorithm]:
    def algorithm(space: SearchSpace, objectives: Sequence[Objective], seed: int) -> Algorithm:
        return Sampled(space, objectives, make(seed, len(space.openings())), seed)

    return algorithm


def _tpe(seed: int, first: int) -> BaseSampler:
    """One that learns which densities suit which family, not of each parameter alone: alone it was hardly better than
    chance (docs/search.md)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # what both arguments still are
        return TPESampler(n_startup_trials=first, seed=seed, multivariate=True, group=True)


def _grid(space: SearchSpace, objectives: Sequence[Objective], seed: int) -> Algorithm:
    """All combinations after the fixed points, in an order that the seed draws: any part of it is a sample."""
    fixed = space.fixed_points()
    others = list(space.grid())[len(fixed) :]
    random.Random(seed).shuffle(others)
    return Listed([*fixed, *others])


# name -> (space, objectives, seed) -> Algorithm
ALGORITHMS: dict[str, Callable[[SearchSpace, Sequence[Objective], int], Algorithm]] = {
    "tpe": _sampled(_tpe),
    "nsga2": _sampled(lambda seed, first: NSGAIISampler(population_size=max(8, first), seed=seed)),
    "random": _sampled(lambda seed, first: RandomSampler(seed=seed)),
    "grid": _grid,
}
