"""search: Ray Tune asks an algorithm for questions, warm workers answer them, every answer is on disk at once.

Each of Tune's trial actors is kept for trials of as many ranks (``reuse_actors``) and holds a Coordinator with one
worker, or a ring, so that a trial costs its own measurement and little else, and all that is known about failures stays
in one place. A trial that lost its actor begins again in another, as soon as there is room for it. The records are the
only state: a search that was ended, however, goes on from them.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ray import tune
from ray.util import get_current_placement_group

from raybsa.cluster.resources import Say, Share, TooFewResources, await_resources
from raybsa.cluster.ring_coordinator import coordinator_of
from raybsa.experiments.algorithms import ALGORITHMS
from raybsa.experiments.history import Answered, history, values_of
from raybsa.experiments.keeping import keep
from raybsa.experiments.lock_watch import LockWatch
from raybsa.experiments.patience import Patience
from raybsa.experiments.previews import LOOKED, PREVIEW, Previews, preview_of
from raybsa.experiments.questions import LATE, Questions
from raybsa.experiments.recording import Run
from raybsa.experiments.screen import Screen
from raybsa.experiments.space import Config, SearchSpace
from raybsa.experiments.strata import QUALITY, STEPS, StratifiedHalving
from raybsa.results.pareto import Objective
from raybsa.results.record import Outcome, Record, finite
from raybsa.results.store import Store
from raybsa.scratch import scratch
from raybsa.spec import DENSE, UNTRAINED, TrialSpec
from raybsa.tasks.goals import QUALITIES

_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # records are ours to write
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # and they are all that a resumed search reads
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the older output is silent at verbose=0
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # what a trial could not survive is in its record
}
_LOST_ACTORS = 2  # how often a trial begins again whose actor was lost with its node, or found no room for its ring


@dataclass(frozen=True)
class Pool:
    """The workers of a search.

    Args:
        share: what each owns; each rank of a ring too.
        num_workers: how many trials run at once; None is as many as the cluster holds, which may change meanwhile.
        wait_s: the longest wait for the cluster to have room for all of them (for one, where None) and for the largest
            ring; later on twice as long where no trial can run.
        trial_s: the longest that one step of a trial may take.
        timing: ``repeats`` and ``budget_s`` of ``timing.measure_in_turn``.
        keep: digest of a question -> the file that its weights are written to once it is trained.
    """

    share: Share
    num_workers: int | None = 1
    wait_s: float = 60.0
    trial_s: float = 1800.0
    timing: dict[str, Any] = field(default_factory=dict)
    keep: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How a search spends its budget.

    Args:
        trials: how many in all, those of earlier runs that it resumes included.
        objectives: what the questions should trade off, and bounds.
        algorithm: of ``ALGORITHMS``.
        seed: of the algorithm; with several workers the questions also depend on who answers first.
        time_budget_s: no trial begins later; those under way end.
        early_stopping: stop trials whose quality falls behind others of about their density.
        screening: do not train what is predicted to be beaten by a wide margin.
        previews: look at so many questions for each one that is trained (previews.py); 0 trains all.
        resume: go on from the records that the store holds of this space.
    """

    trials: int
    objectives: Sequence[Objective]
    algorithm: str = "tpe"
    seed: int = 0
    time_budget_s: float = math.inf
    early_stopping: bool = False
    screening: bool = False
    previews: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        if self.previews < 0 or (self.previews and all(o.column != "quality" for o in self.objectives)):
            raise ValueError(
                f"previews are of quality, which must be an objective, and at least 0 for each training; got "
                f"{self.previews} with {', '.join(map(str, self.objectives))}"
            )


@dataclass(frozen=True)
class Found:
    """``records`` of this run in the order in which they ended, ``earlier`` ones, and what was ``rejected``, in words.
    ``ended``: why, where that was before all trials were asked; else empty."""

    records: list[Record]
    earlier: list[Record]
    rejected: str
    ended: str

    @property
    def all(self) -> list[Record]:
        return [*self.earlier, *self.records]


def search(
    space: SearchSpace,
    store: Store,
    run: Run,
    pool: Pool,
    plan: Plan,
    *,
    tell: Callable[[Record], None] = lambda record: None,
    say: Say = print,
) -> Found:
    """Runs the plan's trials, the dense baseline first.

    Each record is in ``store`` before the next step of the search. A trial that fails becomes a failed record and the
    search goes on. Ctrl-C ends the search early; what was measured stays.

    Args:
        tell: called with each record once it is stored.
        say: where messages about waits go.

    Raises:
        TooFewResources: the cluster cannot hold ``pool`` within its ``wait_s``.
    """
    await_resources(pool.share, max(pool.num_workers or 1, *space.world_sizes), pool.wait_s, say)
    os.environ.update(_TUNE_SETTINGS)
    earlier = history(space, store.read_records(), plan.previews > 0, store.pass_over) if plan.resume else []
    screen = Screen(plan.objectives)
    weights = _weights(space, store) if plan.previews else None
    questions = make_questions(space, plan, earlier, screen, weights)
    keeping = replace(pool, keep={space.spec({"family": DENSE}).digest: weights}) if weights else pool
    halving = _halving(space, plan, earlier, store)
    recorder = _Recorder(space, store, run, (screen.learn, tell))
    rungs = halving.rungs if halving else []
    deadline = time.time() + plan.time_budget_s
    actor = tune.with_parameters(_TrialActor, space=space, pool=keeping, plan=plan, rungs=rungs, deadline=deadline)
    ranks = partial(ranks_of, space)
    patience, ended = Patience(pool.share, ranks, pool.wait_s, say), ""
    with scratch("tune") as folder:
        tuner = tune.Tuner(
            tune.with_resources(actor, partial(_bundles, pool.share, ranks)),
            tune_config=tune.TuneConfig(
                search_alg=questions,
                scheduler=halving,
                num_samples=-1 if plan.previews else max(1, plan.trials - len(earlier)),
                max_concurrent_trials=pool.num_workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=run.run_id,
                storage_path=folder,
                callbacks=[recorder, patience, LockWatch(say)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=_LOST_ACTORS),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except TooFewResources as error:
            if not recorder.records:
                raise
            ended = str(error)
    return Found(
        recorder.records,
        [answered.record for answered in earlier if PREVIEW not in answered.config],
        str(questions.rejections),
        ended or questions.ended,
    )


def ranks_of(space: SearchSpace, config: Config) -> int:
    """How many workers a configuration's trial needs at once; a preview is one evaluation, which one can do."""
    return 1 if PREVIEW in config else space.spec(config).ranks.world_size


def _bundles(share: Share, ranks: Callable[[Config], int], config: Config) -> tune.PlacementGroupFactory:
    """What Tune reserves for a trial: its actor, which only waits, and its workers, close together. Workers that are
    not in here would wait for ever inside of it."""
    return tune.PlacementGroupFactory([{}, *[share.bundle] * ranks(config)], strategy="PACK")


def _weights(space: SearchSpace, store: Store) -> str:
    """The file of the dense baseline's weights, which every worker must be able to read."""
    if "://" in store.root or space.base.task in UNTRAINED:
        raise ValueError(
            f"previews need a trained baseline's weights in a folder that all workers see, "
            f"got results in {store.root!r} and task {space.base.task!r}"
        )
    return os.path.join(os.path.abspath(store.root), "weights", f"{space.base.digest}.pt")


def make_questions(
    space: SearchSpace, plan: Plan, earlier: Sequence[Answered], screen: Screen, weights: str | None = None
) -> Questions:
    """What the plan asks, after ``earlier`` trials, which ``screen`` learns too; previews borrow from ``weights``."""
    for answered in earlier:
        screen.learn(answered.record)
    return Questions(
        space,
        ALGORITHMS[plan.algorithm](space, plan.objectives, plan.seed),
        plan.objectives,
        trials=plan.trials,
        earlier=earlier,
        screen=screen if plan.screening else lambda spec: None,
        deadline=time.monotonic() + plan.time_budget_s,
        previews=Previews(space, plan.objectives, weights, plan.previews, lambda: screen.model) if weights else None,
    )


def _halving(space: SearchSpace, plan: Plan, earlier: Sequence[Answered], store: Store) -> StratifiedHalving | None:
    if not plan.early_stopping or space.base.task in UNTRAINED:
        return None
    halving = StratifiedHalving(space.base.train_steps, QUALITIES[space.base.task][1])
    halving.replay(earlier, store.read_series() if earlier else ())
    return halving


class _TrialActor(tune.Trainable):
    """Tune's side of a trial: asks its Coordinator, whose worker or ring stays warm from trial to trial. A step is a
    rung.

    What breaks a bound of a cost is known once it is timed, and then not trained.
    """

    def setup(self, config: dict[str, Any], **parts: Any) -> None:
        """``parts``: the search's ``space``, ``pool``, ``plan``, ``rungs`` (training steps) and ``deadline``."""
        self._space, self._plan, pool = parts["space"], parts["plan"], parts["pool"]
        self._rungs, self._rung = [*parts["rungs"], None], 0
        self._bounds = [o for o in self._plan.objectives if o.is_bounded and o.column != "quality"]
        self._deadline = parts["deadline"]
        self._coordinator = coordinator_of(
            ranks_of(self._space, config),
            pool.share,
            wait_s=pool.wait_s,
            trial_s=pool.trial_s,
            timing={**pool.timing, "keep": pool.keep},
            group=get_current_placement_group(),
        )

    def step(self) -> dict[str, Any]:
        spec = self._space.spec(self.config)
        if not self._rung and time.time() > self._deadline:
            return {**self._result(Outcome(spec, None, None, 0)), LATE: True, "done": True}
        if PREVIEW in self.config:
            return self._look(preview_of(spec, self.config[PREVIEW]))
        outcome = self._out_of_bounds(self._coordinator.run(spec, 0)) if self._bounds and not self._rung else None
        outcome = outcome or self._coordinator.run(spec, self._rungs[self._rung])
        self._rung += 1
        ended = outcome.error is not None or outcome.pruned is not None or self._rung == len(self._rungs)
        return {**self._result(outcome), "outcome": outcome, "done": ended}

    def _look(self, spec: TrialSpec) -> dict[str, Any]:
        """A preview: one step, which is no trial."""
        outcome = self._coordinator.run(spec)
        outcome = outcome if outcome.error else replace(outcome, pruned=LOOKED)
        return {**self._result(outcome), "outcome": outcome, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._rung = 0
        return True

    def cleanup(self) -> None:
        self._coordinator.close()

    def _result(self, outcome: Outcome) -> dict[str, float | int]:
        """What the algorithm learns from (NaN where it was not measured), and what early stopping compares."""
        measured, objectives = outcome.measurement, self._plan.objectives
        found: dict[str, float | int] = dict(
            zip([o.name for o in objectives], values_of(measured, objectives), strict=True)
        )
        measured = measured and finite(measured)
        if measured and measured.quality is not None and measured.trained_steps is not None:
            found |= {QUALITY: measured.quality, STEPS: measured.trained_steps}
        return found

    def _out_of_bounds(self, timed: Outcome) -> Outcome | None:
        """The outcome where there is nothing to train: it failed, or a cost is out of its bounds."""
        if timed.error:
            return timed
        for bound, value in zip(self._bounds, values_of(timed.measurement, self._bounds), strict=True):
            if bound.excess(value) > 0:
                return replace(timed, pruned=f"not trained: {bound.name} {value:g} breaks the bound of {bound}")
        return None


class _Recorder(tune.Callback):
    """Writes each answer as it comes, on the driver's side."""

    def __init__(self, space: SearchSpace, store: Store, run: Run, tell: Sequence[Callable[[Record], None]]) -> None:
        self._space, self._store, self._run, self._tell = space, store, run, tell
        self._numbers: dict[str, int] = {}
        self._lost: Counter[str] = Counter()
        self.records: list[Record] = []

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """New trials are the last of the list, in the order in which they were asked."""
        for trial in trials:
            self._number(trial)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """It begins again."""
        self._lost[trial.trial_id] += 1

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """``done`` is set by the trial itself where it came to its end, and by Tune where a scheduler stops it."""
        if not result["done"] or result.get(LATE):
            return
        outcome = result["outcome"]
        measured = outcome.measurement
        steps = self._space.base.train_steps
        if not outcome.error and not outcome.pruned and measured.quality is not None and measured.trained_steps < steps:
            outcome = replace(outcome, pruned=f"stopped after {measured.trained_steps} of {steps} training steps")
        self._keep(trial, outcome)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The trial's own actor was lost, again and again, not only its worker; or it found no room for its ring."""
        reason = str(trial.get_error()).strip().splitlines()[-1]
        error = f"its trial actor failed {self._lost[trial.trial_id] + 1} times: {reason}"
        self._keep(trial, Outcome(self._space.spec(trial.config), None, error, 1))

    def _keep(self, trial: Any, outcome: Outcome) -> None:
        outcome = replace(outcome, failures=outcome.failures + self._lost[trial.trial_id])
        record = keep(self._store, outcome, self._run, self._run.trial_id(self._number(trial)))
        if outcome.spec.weights is not None:
            return
        self.records.append(record)
        for listener in self._tell:
            listener(record)

    def _number(self, trial: Any) -> int:
        """Its own: Tune moves a trial that begins again to the end of its list."""
        return self._numbers.setdefault(trial.trial_id, len(self._numbers))
