"""Questions: what Ray Tune asks for its next trial. An algorithm's configurations, less those not worth one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from raybsa.experiments.algorithms import Algorithm
from raybsa.experiments.history import Answered, values_of
from raybsa.experiments.space import Config, SearchSpace
from raybsa.experiments.validity import Rejections
from raybsa.results.pareto import Objective
from raybsa.spec import TrialSpec

_FUTILE = 500  # rejections in a row after which a space counts as exhausted

Screen = Callable[[TrialSpec], str | None]


class Questions(Searcher):
    """Asks ``algorithm`` until a question may be asked, at most ``trials`` times, none once the time is up.

    Args:
        earlier: finished trials of earlier runs; they count, are told to the algorithm and are not asked again.
        screen: says why a question is not worth its training; None where it is.
        trials: how many in all, earlier ones included.
        deadline: ``time.monotonic()`` after which no trial begins.
    """

    def __init__(
        self,
        space: SearchSpace,
        algorithm: Algorithm,
        objectives: Sequence[Objective],
        *,
        trials: int,
        earlier: Sequence[Answered] = (),
        screen: Screen = lambda spec: None,
        deadline: float = math.inf,
    ) -> None:
        super().__init__()
        self._algorithm, self._objectives, self._screen, self._deadline = algorithm, objectives, screen, deadline
        self.rejections = Rejections(space)
        self._under_way: dict[str, Config] = {}
        self._left = trials - len(earlier)
        self.ended = ""  # why, where it was before all trials were asked
        for config, spec, record in earlier:
            self.rejections.remember(spec)
            if record.status in ("ok", "pruned"):
                algorithm.tell(config, values_of(record, objectives))

    def suggest(self, trial_id: str) -> Any:
        config = self.next()
        if config is None:
            return self.FINISHED
        self._under_way[trial_id] = config
        return config

    def next(self) -> Config | None:
        """The next configuration to measure; None where the budget or the space has none left."""
        if self._left <= 0:
            return None
        if time.monotonic() >= self._deadline:
            self.ended = "its time is up"
            return None
        self.ended = "nothing is left to ask"
        for refused in range(_FUTILE):
            config = self._algorithm.ask(refused)
            if config is None:
                return None
            spec = self.rejections.admit(config)
            reason = None if spec is None else self._screen(spec)
            if spec is not None and reason is None:
                self._left, self.ended = self._left - 1, ""
                return config
            if reason:
                self.rejections.counts[reason] += 1
            self._algorithm.tell(config, None)
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        config = self._under_way.pop(trial_id, None)
        if config is None:
            return
        values = None if error or result is None else [float(result[o.name]) for o in self._objectives]
        self._algorithm.tell(config, values)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search goes on from its records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see ``save``."""
