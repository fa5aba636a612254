"""search: Ray Tune asks Optuna for questions, warm workers answer them, every answer is on disk at once.

Each of Tune's trial actors is kept for all its trials (``reuse_actors``) and holds a Coordinator with one worker, so
that a trial costs its own measurement and little else, and all that is known about failures stays in one place.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from ray import tune
from ray.tune.search.optuna import OptunaSearch
from ray.util import get_current_placement_group

from raybsa.cluster.coordinator import Coordinator
from raybsa.cluster.resources import Say, Share, await_resources
from raybsa.experiments.recording import Run, record_of, write
from raybsa.experiments.space import SearchSpace
from raybsa.results.pareto import Objective
from raybsa.results.record import Outcome, Record
from raybsa.results.store import Store

_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # records are ours to write
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the older output is silent at verbose=0
}


@dataclass(frozen=True)
class Pool:
    """The workers of a search.

    Args:
        share: what each owns.
        num_workers: how many trials run at once.
        wait_s: the longest wait for the cluster to have room for all of them.
        trial_s: the longest that a trial may take.
        timing: ``repeats`` and ``budget_s`` of ``timing.measure_in_turn``.
    """

    share: Share
    num_workers: int = 1
    wait_s: float = 60.0
    trial_s: float = 1800.0
    timing: dict[str, Any] = field(default_factory=dict)


def search(
    space: SearchSpace,
    store: Store,
    run: Run,
    pool: Pool,
    *,
    trials: int,
    objectives: Sequence[Objective],
    seed: int = 0,
    tell: Callable[[Record], None] = lambda record: None,
    say: Say = print,
) -> list[Record]:
    """Runs ``trials`` trials, the dense baseline first, and returns their records in the order in which they ended.

    Each record is in ``store`` before the next step of the search. A trial that fails becomes a failed record and the
    search goes on. Ctrl-C ends the search early; what was measured stays.

    Args:
        objectives: what the questions should trade off. After the space's first points as many are drawn at random,
            then Optuna's multi-objective sampler (TPE) learns from the answers.
        seed: of the sampler; with several workers the questions also depend on who answers first.
        tell: called with each record once it is stored.
        say: where messages about waits go.

    Raises:
        TooFewResources: the cluster cannot hold ``pool`` within its ``wait_s``.
    """
    await_resources(pool.share, pool.num_workers, pool.wait_s, say)
    os.environ.update(_TUNE_SETTINGS)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    recorder = _Recorder(space, store, run, tell)
    first = space.first_points()
    searcher = _Questions(
        space=space.suggest,
        metric=[objective.name for objective in objectives],
        mode=[objective.goal for objective in objectives],
        points_to_evaluate=[{}, *first[1:]],
        sampler=optuna.samplers.TPESampler(n_startup_trials=2 * len(first), seed=seed),
    )
    actor = tune.with_parameters(_TrialActor, space=space, pool=pool, objectives=tuple(objectives))
    bundles = tune.PlacementGroupFactory([{}, pool.share.bundle])
    with tempfile.TemporaryDirectory(prefix="raybsa-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(actor, bundles),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=trials,
                max_concurrent_trials=pool.num_workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=run.run_id,
                storage_path=scratch,
                callbacks=[recorder],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    return recorder.records


class _TrialActor(tune.Trainable):
    """Tune's side of a trial: asks its Coordinator, whose one worker stays warm from trial to trial."""

    def setup(self, config: dict[str, Any], **parts: Any) -> None:
        """``parts``: the search's ``space``, ``pool`` and ``objectives``."""
        self._space, self._objectives, pool = parts["space"], parts["objectives"], parts["pool"]
        self._coordinator = Coordinator(
            pool.share,
            wait_s=pool.wait_s,
            trial_s=pool.trial_s,
            timing=pool.timing,
            group=get_current_placement_group(),
        )

    def step(self) -> dict[str, Any]:
        outcome = self._coordinator.run(self._space.spec(self.config))
        measured = {objective.name: _value(outcome, objective) for objective in self._objectives}
        return {**measured, "outcome": outcome, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def cleanup(self) -> None:
        self._coordinator.close()


class _Questions(OptunaSearch):
    """Tells Optuna that a trial without all of its objectives failed, where Tune only sees a trial that ended."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        failed = error or result is None or not all(math.isfinite(result[name]) for name in self.metric)
        super().on_trial_complete(trial_id, None if failed else result, error=failed)


class _Recorder(tune.Callback):
    """Writes each answer as it comes, on the driver's side."""

    def __init__(self, space: SearchSpace, store: Store, run: Run, tell: Callable[[Record], None]) -> None:
        self._space, self._store, self._run, self._tell = space, store, run, tell
        self.records: list[Record] = []

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self._keep(trials.index(trial), result["outcome"])

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The trial's own actor was lost, not only its worker."""
        error = f"its trial actor was lost: {str(trial.get_error()).strip().splitlines()[-1]}"
        self._keep(trials.index(trial), Outcome(self._space.spec(trial.config), None, error, 1))

    def _keep(self, index: int, outcome: Outcome) -> None:
        record = record_of(outcome, self._run, f"{self._run.run_id}-{index:03d}")
        write(self._store, record, outcome)
        self.records.append(record)
        self._tell(record)


def _value(outcome: Outcome, objective: Objective) -> float:
    """The objective of an outcome; NaN where it was not measured."""
    value = getattr(outcome.measurement, objective.column, None)
    return math.nan if value is None else float(value)
