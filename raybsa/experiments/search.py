"""search: Ray Tune asks an algorithm for questions, warm workers answer them, every answer is on disk at once.

Each of Tune's trial actors is kept for trials of as many ranks (``reuse_actors``) and holds a Coordinator with one
worker, or a ring, so that a trial costs its own measurement and little else, and all that is known about failures stays
in one place. A trial that lost its actor begins again in another, as soon as there is room for it. The records are the
only state: a search that was ended, however, goes on from them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ray import tune
from ray.tune.error import TuneError
from ray.util import get_current_placement_group

from raybsa import signals
from raybsa.cluster.resources import Say, Share, TooFewResources, await_resources
from raybsa.cluster.ring_coordinator import coordinator_of
from raybsa.experiments.algorithms import ALGORITHMS
from raybsa.experiments.budget import Budget, is_up
from raybsa.experiments.history import Answered, history, values_of
from raybsa.experiments.lock_watch import LockWatch
from raybsa.experiments.patience import Patience
from raybsa.experiments.previews import LOOKED, PREVIEW, Previews, preview_of, previewed
from raybsa.experiments.questions import LATE, Questions
from raybsa.experiments.recorder import OutsideTrouble, Recorder
from raybsa.experiments.recording import Run
from raybsa.experiments.screen import Screen
from raybsa.experiments.space import Config, SearchSpace
from raybsa.experiments.strata import QUALITY, STEPS, StratifiedHalving
from raybsa.results.claims import Claims
from raybsa.results.pareto import Objective
from raybsa.results.record import QUESTION, Outcome, Record, finite
from raybsa.results.store import Store, StoreError
from raybsa.scratch import scratch
from raybsa.spec import DENSE, UNTRAINED, TrialSpec
from raybsa.tasks.goals import QUALITIES

_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # records are ours to write
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # and they are all that a resumed search reads
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the older output is silent at verbose=0
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # what a trial could not survive is in its record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # whoever interrupts a search wants its front now, not in some seconds
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
    """What a search found.

    Args:
        records: of this run, in the order in which they ended.
        earlier: those of earlier runs that it went on from.
        rejected: what was not asked, in words.
        ended: why, where the plan's own bounds ended it before all trials were asked; else empty.
        trouble: why it could not go on, for a reason outside of it; else empty.
        interrupted: by a signal.
        unwritten: records that the store does not have.
    """

    records: list[Record]
    earlier: list[Record]
    rejected: str
    ended: str = ""
    trouble: str = ""
    interrupted: bool = False
    unwritten: Sequence[Record] = ()

    @property
    def all(self) -> list[Record]:
        return [*self.earlier, *self.records]

    @property
    def measured(self) -> list[Record]:
        return [record for record in self.all if record.status != "failed"]

    @property
    def unanswered(self) -> list[Record]:
        """Failed for reasons outside of their questions, or unknown ones: ``resume`` asks them again."""
        return [record for record in self.all if record.status == "failed" and record.error_cause != QUESTION]


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
    search goes on. It ends early, with all that was measured, on a signal (``signals.py``), when records cannot be
    written, Ray Tune cannot go on, or trial after trial fails for reasons outside of it.

    Args:
        tell: called with each record once it is stored.
        say: where messages about waits go.

    Raises:
        TooFewResources: the cluster cannot hold ``pool`` within its ``wait_s``.
    """
    await_resources(pool.share, max(pool.num_workers or 1, *space.world_sizes), pool.wait_s, say)
    os.environ.update(_TUNE_SETTINGS)
    claims = Claims(store, lambda spec: space.config(previewed(spec)) is not None, yields=plan.resume, say=say)
    with contextlib.closing(claims):
        return _search(space, store, run, pool, plan, claims, tell, say)


def _search(
    space: SearchSpace,
    store: Store,
    run: Run,
    pool: Pool,
    plan: Plan,
    claims: Claims,
    tell: Callable[[Record], None],
    say: Say,
) -> Found:
    earlier = history(space, store.read_records(), plan.previews > 0, store.pass_over) if plan.resume else []
    claims.know(answered.record.spec_hash for answered in earlier)
    screen = Screen(plan.objectives)
    weights = _weights(space, store) if plan.previews else None
    keeping = replace(pool, keep={space.spec({"family": DENSE}).digest: weights}) if weights else pool
    halving = _halving(space, plan, earlier, store)
    recorder = Recorder(space, store, run, (screen.learn, tell, lambda record: claims.release(record.spec_hash)))
    rungs = halving.rungs if halving else []
    ranks = partial(ranks_of, space)
    patience = Patience(pool.share, ranks, pool.wait_s, say)
    trouble, interrupted = "", False
    with Budget(plan.time_budget_s, run.run_id) as budget, scratch("tune") as folder:
        questions = make_questions(space, plan, earlier, screen, weights, claims, deadline=budget.deadline)
        late = budget.question
        actor = tune.with_parameters(_TrialActor, space=space, pool=keeping, plan=plan, rungs=rungs, late=late)
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
                callbacks=[budget, patience, LockWatch(say), recorder],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=_LOST_ACTORS),
                verbose=0,
            ),
        )
        try:
            with signals.deferred(), _without_tunes_words():
                tuner.fit()
        except KeyboardInterrupt:
            interrupted = True
        except TooFewResources as error:
            if not recorder.records:
                raise
            trouble = str(error)
        except (OutsideTrouble, StoreError) as error:
            trouble = str(error)
        except OSError as error:
            trouble = f"results in {store.root!r} could not be read or written: {error}"
        except TuneError as error:  # its text is a whole traceback
            trouble = f"Ray Tune could not go on: {str(error).strip().rpartition(chr(10))[2]}"
    unwritten = recorder.write_again() if trouble else []
    if plan.resume and not trouble and claims.elsewhere():
        own = {record.trial_id for record in recorder.records}
        earlier = [a for a in history(space, store.read_records()) if a.record.trial_id not in own]
    return Found(
        recorder.records,
        [answered.record for answered in earlier if PREVIEW not in answered.config],
        str(questions.rejections),
        questions.ended,
        trouble,
        interrupted,
        unwritten,
    )


@contextlib.contextmanager
def _without_tunes_words() -> Iterator[None]:
    """Tune logs a page of tracebacks about what this search says in one line."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


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
    space: SearchSpace,
    plan: Plan,
    earlier: Sequence[Answered],
    screen: Screen,
    weights: str | None = None,
    claims: Claims | None = None,
    *,
    deadline: float = math.inf,
) -> Questions:
    """What the plan asks until ``deadline`` (of ``time.monotonic``), after ``earlier`` trials, which ``screen`` learns
    too; previews borrow from ``weights``; ``claims`` keep what other searches ask from being asked again."""
    for answered in earlier:
        screen.learn(answered.record)
    return Questions(
        space,
        ALGORITHMS[plan.algorithm](space, plan.objectives, plan.seed),
        plan.objectives,
        trials=plan.trials,
        earlier=earlier,
        screen=screen if plan.screening else lambda spec: None,
        deadline=deadline,
        previews=Previews(space, plan.objectives, weights, plan.previews, lambda: screen.model) if weights else None,
        claim=claims.take if claims else lambda spec: True,
        elsewhere=claims.elsewhere if claims else lambda: 0,
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
        """``parts``: the search's ``space``, ``pool``, ``plan``, ``rungs`` (steps), and ``late`` of its Budget."""
        self._space, self._plan, pool = parts["space"], parts["plan"], parts["pool"]
        self._rungs, self._rung = [*parts["rungs"], None], 0
        self._bounds = [o for o in self._plan.objectives if o.is_bounded and o.column != "quality"]
        self._late = parts["late"]
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
        if not self._rung and is_up(self._late):
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
