"""Questions: what Ray Tune asks for its next trial. An algorithm's configurations, less those not worth one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from raybsa.experiments.algorithms import Algorithm
from raybsa.experiments.history import Answered, values_of
from raybsa.experiments.previews import PREVIEW, Previews
from raybsa.experiments.space import Config, SearchSpace
from raybsa.experiments.validity import Rejections
from raybsa.results.pareto import Objective
from raybsa.results.record import Measured
from raybsa.spec import DENSE, TrialSpec

_FUTILE = 500  # rejections in a row after which a space counts as exhausted
_TIME_IS_UP = "its time is up"
_ELSEWHERE = "another search in this folder asks the rest"
LATE = "late"  # key of a result: the trial had to wait for room until no trial may begin any more

Screen = Callable[[TrialSpec], str | None]


class Questions(Searcher):
    """Asks ``algorithm`` until a question may be asked, at most ``trials`` times, none once the time is up.

    With ``previews``, most questions are only looked at, which is no trial; what promises most is asked again, as one.

    Args:
        earlier: finished trials of earlier runs; they count, are told to the algorithm and are not asked again (their
            previews, which do not count, neither).
        screen: says why a question is not worth its training; None where it is.
        trials: how many in all, earlier ones included.
        deadline: ``time.monotonic()`` after which no trial begins.
        previews: what to look at before it is trained; None trains all.
        claim: whether a question may be asked here: not where another search asks it now. It counts as a trial.
        elsewhere: how many trials other searches have taken meanwhile.
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
        previews: Previews | None = None,
        claim: Callable[[TrialSpec], bool] = lambda spec: True,
        elsewhere: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__()
        self._algorithm, self._objectives, self._screen, self._deadline = algorithm, objectives, screen, deadline
        self._space, self._previews, self._claim, self._elsewhere = space, previews, claim, elsewhere
        self.rejections = Rejections(space)
        self._under_way: dict[str, Config] = {}
        self._left = trials - sum(PREVIEW not in answered.config for answered in earlier)
        self.ended = ""  # why, where it was before all trials were asked
        for config, spec, record in earlier:
            self.rejections.remember(spec)
            if previews is not None:
                self._learn(previews, config, record, values_of(record, objectives))
            elif record.status in ("ok", "pruned"):
                algorithm.tell(config, values_of(record, objectives))

    def suggest(self, trial_id: str) -> Any:
        config = self.next()
        if config is None:
            return self.FINISHED
        self._under_way[trial_id] = config
        return config

    def next(self) -> Config | None:
        """The next configuration to measure; None where the budget or the space has none left."""
        while self._left - self._elsewhere() > 0:
            if time.monotonic() >= self._deadline:
                self.ended = _TIME_IS_UP
                return None
            config = self._trial(self._new()) if self._previews is None else self._previewed(self._previews)
            if config is None or PREVIEW in config or self._claim(self._space.spec(config)):
                return config
            self._left += 1  # it is one of those elsewhere
            self._algorithm.tell(config, None)
        if self._left > 0:
            self.ended = _ELSEWHERE
        return None

    def _previewed(self, previews: Previews) -> Config | None:
        """A trial that is due, else a new question, if only to look at it; in the end what is left of the old ones."""
        if previews.in_vain:
            return self._trial(None)
        if due := previews.due():
            return self._trial(due)
        config = self._new()
        return (config and previews.of(config)) or self._trial(config or previews.best())

    def _trial(self, config: Config | None) -> Config | None:
        """Counts a trial; None where there is nothing left to ask."""
        self.ended = "nothing is left to ask" if config is None else ""
        self._left -= config is not None
        return config

    def _new(self) -> Config | None:
        """A configuration that may be asked; None where none is found."""
        for refused in range(_FUTILE):
            config = self._algorithm.ask(refused)
            if config is None:
                return None
            spec = self.rejections.admit(config)
            reason = None if spec is None else self._screen(spec)
            if spec is not None and reason is None:
                return config
            if reason:
                self.rejections.counts[reason] += 1
            self._algorithm.tell(config, None)
        return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        config = self._under_way.pop(trial_id, None)
        if config is None:
            return
        if result and result.get(LATE):  # it was not begun
            self.ended, result = _TIME_IS_UP, None
        values = None if error or result is None else [float(result[o.name]) for o in self._objectives]
        if self._previews is None:
            self._algorithm.tell(config, values)
        else:
            self._learn(self._previews, config, result["outcome"].measurement if result and not error else None, values)

    def _learn(self, previews: Previews, config: Config, measured: Measured | None, values: list[float] | None) -> None:
        """What was looked at first is told to the algorithm by its look alone: so it compares like with like."""
        plain = {name: value for name, value in config.items() if name != PREVIEW}
        if plain != config or plain["family"] == DENSE:
            self._algorithm.tell(plain, previews.learn(plain, measured) if measured else None)
        elif not previews.was_trained(self._space.spec(config)):
            self._algorithm.tell(config, values)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search goes on from its records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see ``save``."""
