"""What a search tells its sampler and its store when a trial does not give what was asked."""

import math
from types import SimpleNamespace

import optuna
import pytest

from raybsa.experiments.algorithms import Sampled
from raybsa.experiments.history import values_of
from raybsa.experiments.questions import Questions
from raybsa.experiments.recording import Run
from raybsa.experiments.search import _Recorder
from raybsa.experiments.space import SearchSpace
from raybsa.results.pareto import DENSITY, LATENCY
from raybsa.results.record import Measurement
from raybsa.results.store import Store
from raybsa.spec import AttentionSpec, TrialSpec

SPACE = SearchSpace(TrialSpec("speed", (AttentionSpec("dense"),)), {"random": {}})


@pytest.mark.parametrize(
    ("measured", "wanted"),
    [
        (Measurement(density=0.5, forward_backward_ms_p50=2.0), "COMPLETE"),
        (Measurement(density=0.5, forward_backward_ms_p50=math.nan), "FAIL"),
        (Measurement(density=0.5), "FAIL"),
        (None, "FAIL"),
    ],
    ids=["measured", "not a number", "not measured", "failed"],
)
def test_the_sampler_learns_only_from_trials_with_every_objective(measured, wanted):
    goals = (LATENCY, DENSITY)
    sampled = Sampled(SPACE, goals, optuna.samplers.RandomSampler(seed=0))
    questions = Questions(SPACE, sampled, goals, trials=9)
    asked = [questions.suggest(str(number)) for number in range(3)]
    assert asked[:2] == SPACE.first_points()
    values = dict(zip(("latency", "density"), values_of(measured, goals), strict=True))
    questions.on_trial_complete("2", values)
    (trial,) = sampled._study.trials
    assert trial.state == optuna.trial.TrialState[wanted]


def test_a_lost_trial_actor_is_recorded_with_the_reason(tmp_path):
    store, told = Store.create(tmp_path), []
    lost = SimpleNamespace(
        config={"family": "dense"}, get_error=lambda: RuntimeError("Traceback ...\nActorDiedError: its node is gone\n")
    )
    _Recorder(SPACE, store, Run("run", "test"), [told.append]).on_trial_error(0, [None, lost], lost)
    (record,) = store.read_records()
    assert told == [record]
    assert (record.trial_id, record.status) == ("run-001", "failed")
    assert record.error == "its trial actor was lost: ActorDiedError: its node is gone"
