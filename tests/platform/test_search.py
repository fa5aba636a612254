"""What a search tells its sampler and its store when a trial does not give what was asked."""

import math
import pickle
import shutil
from functools import partial
from types import SimpleNamespace

import optuna
import pytest

from raybsa.cluster.resources import Share, TooFewResources
from raybsa.experiments import search
from raybsa.experiments.algorithms import Sampled
from raybsa.experiments.budget import Budget, is_up
from raybsa.experiments.history import values_of
from raybsa.experiments.patience import Patience
from raybsa.experiments.previews import PREVIEW
from raybsa.experiments.questions import Questions
from raybsa.experiments.recorder import OutsideTrouble, Recorder
from raybsa.experiments.recording import Run
from raybsa.experiments.search import Plan, Pool, ranks_of
from raybsa.experiments.space import SearchSpace
from raybsa.results.pareto import DENSITY, LATENCY
from raybsa.results.record import MACHINE, QUESTION, Measurement, Outcome
from raybsa.results.store import Store, StoreError
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


def trial(name, status="RUNNING", config=None):
    return SimpleNamespace(
        trial_id=name,
        status=status,
        config=config or {"family": "dense"},
        get_error=lambda: RuntimeError("Traceback ...\nActorDiedError: its node is gone\n"),
    )


def test_a_lost_trial_actor_is_recorded_with_the_reason(tmp_path):
    store, told = Store.create(tmp_path), []
    other, lost = trial("a"), trial("b")
    recorder = Recorder(SPACE, store, Run("run", "test"), [told.append])
    recorder.on_step_end(0, [other, lost])
    recorder.on_trial_recover(0, [other, lost], lost)
    recorder.on_trial_error(0, [other, lost], lost)
    (record,) = store.read_records()
    assert told == [record]
    assert (record.trial_id, record.status, record.failures_survived) == ("run-001", "failed", 2)
    assert record.error == "its trial actor failed 2 times: ActorDiedError: its node is gone"


def test_a_trial_that_begins_again_keeps_its_number_and_counts_what_it_survived(tmp_path):
    """Tune moves it to the end of its list."""
    store, first, second = Store.create(tmp_path), trial("a"), trial("b")
    recorder = Recorder(SPACE, store, Run("run", "test"), [])
    recorder.on_step_end(0, [first, second])
    recorder.on_trial_recover(0, [second, first], first)
    recorder.on_step_end(1, [second, first])
    outcome = Outcome(SPACE.base, Measurement(density=1.0), None, 0)
    for ended in (second, first):
        recorder.on_trial_result(0, [second, first], ended, {"outcome": outcome, "done": True})
    survived = {record.trial_id: record.failures_survived for record in store.read_records()}
    assert survived == {"run-000": 1, "run-001": 0}


RINGS = SearchSpace(SPACE.base, {"random": {}}, world_sizes=(1, 3), block_sizes=(16,))
RING = {"family": "random", "density": 0.5, "block_size": 16, "world_size": 3}


def test_a_trial_takes_a_bundle_a_rank_and_its_preview_one():
    assert [ranks_of(RINGS, config) for config in (RING, {**RING, "world_size": 1}, {**RING, PREVIEW: "w"})] == [
        3,
        1,
        1,
    ]
    assert ranks_of(RINGS, {"family": "dense"}) == 1


@pytest.fixture
def actor(monkeypatch):
    """Makes Tune's side of a trial whose Coordinator says what it was made with and asked for."""
    made = []

    def make(config, is_up=False):
        monkeypatch.setattr(search, "is_up", lambda question: is_up)
        monkeypatch.setattr(search, "get_current_placement_group", lambda: "group")
        monkeypatch.setattr(search, "coordinator_of", lambda ranks, share, **options: made.append((ranks, options)))
        one = object.__new__(search._TrialActor)
        one.config = config
        one.setup(config, space=RINGS, pool=Pool(Share()), plan=Plan(3, (LATENCY,)), rungs=[], late=None)
        return one

    make.made = made
    return make


def test_a_trial_asks_a_ring_in_its_own_placement_group(actor):
    actor(RING)
    ((ranks, options),) = actor.made
    assert ranks == 3
    assert options["group"] == "group"


def test_a_trial_that_found_no_room_before_the_time_was_up_is_not_begun_and_leaves_no_record(actor, tmp_path):
    result = actor(RING, is_up=True).step()
    assert result["done"]
    assert math.isnan(result["latency"])
    store = Store.create(tmp_path)
    Recorder(RINGS, store, Run("run", "test"), []).on_trial_result(0, [], trial("a"), result)
    assert store.read_records() == []
    sampled = Sampled(RINGS, (LATENCY,), optuna.samplers.RandomSampler(seed=0))
    questions = Questions(RINGS, sampled, (LATENCY,), trials=1)
    questions.suggest("a")
    questions.on_trial_complete("a", result)
    assert questions.ended == "its time is up"


def test_a_search_in_which_nothing_can_run_ends_after_a_bounded_wait_and_says_what_is_missing(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr("raybsa.experiments.patience.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("raybsa.experiments.patience.alive_nodes", lambda: [{"CPU": 2}])
    for name in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(f"ray.{name}", lambda: {"CPU": 2})
    patience = Patience(Share(), partial(ranks_of, RINGS), wait_s=10.0, say=lambda text: said.append(text))
    waiting = [trial("a", "TERMINATED"), trial("b", "PENDING", RING)]

    assert pickle.loads(pickle.dumps(patience)), "Tune writes it down, whatever it says things with"

    def step(seconds, trials):
        clock[0] += seconds
        patience.on_step_end(0, trials)

    step(15.0, waiting)
    step(15.0, [*waiting, trial("c", "RUNNING")])
    step(15.0, waiting)
    wanted = "3 workers of 1 CPU and 0 GPU wanted, the cluster has 2 CPU and 0 GPU"
    assert said == [f"waiting up to 5 s: {wanted} (2 CPU and 0 GPU free); no trial can run: "
                    "the cluster is too small for all"] * 2  # fmt: skip
    with pytest.raises(TooFewResources, match=f"{wanted}.*; no trial can run: .*too small for all; gave up after 20 s"):
        step(6.0, waiting)


def failed(cause):
    return Outcome(SPACE.base, None, "took longer than 1 s", 0, cause=cause)


def test_five_trials_in_a_row_that_fail_for_the_machine_s_reasons_end_a_search_and_others_do_not(tmp_path):
    recorder = Recorder(SPACE, Store.create(tmp_path), Run("run", "test"), [])
    trials = [trial(str(number)) for number in range(10)]
    causes = [*[MACHINE] * 4, QUESTION, *[MACHINE] * 5]
    for one, cause in zip(trials, causes, strict=True):
        recorder.on_step_end(0, trials)
        recorder.on_trial_result(0, trials, one, {"outcome": failed(cause), "done": True})
    with pytest.raises(OutsideTrouble, match="5 trials in a row failed for reasons outside: took longer"):
        recorder.on_step_end(0, trials)
    assert [record.error_cause for record in recorder.records] == causes


def test_an_answer_that_cannot_be_written_ends_the_search_and_is_written_once_there_is_a_folder_again(tmp_path):
    """With what was deleted with the folder."""
    store, told = Store.create(tmp_path / "results"), []
    recorder = Recorder(SPACE, store, Run("run", "test"), [told.append])
    trials = [trial("a"), trial("b")]
    outcome = Outcome(SPACE.base, Measurement(density=1.0, curves=(("train_loss", 0, 2.0),)), None, 0)
    recorder.on_trial_result(0, trials, trials[0], {"outcome": outcome, "done": True})
    recorder.on_step_end(0, trials)
    shutil.rmtree(tmp_path / "results")
    (tmp_path / "results").write_text("a file in the way")
    recorder.on_trial_result(0, trials, trials[1], {"outcome": outcome, "done": True})
    with pytest.raises(StoreError, match=r"results could not be written to '.*run-001.parquet'"):
        recorder.on_step_end(0, trials)
    assert [record.trial_id for record in told] == ["run-000", "run-001"], "it is told, whatever the disk says"
    assert recorder.write_again() == [told[1]]
    (tmp_path / "results").unlink()
    assert recorder.write_again() == []
    assert store.read_records() == told
    assert {point.trial_id for point in store.read_series()} == {"run-001"}


def test_a_budget_s_end_is_told_by_the_driver_s_clock_alone(monkeypatch):
    clock, told = [0.0], {}
    monkeypatch.setattr("raybsa.experiments.budget.time.monotonic", lambda: clock[0])
    verbs = {"put": told.__setitem__, "exists": told.__contains__, "del": told.__delitem__, "initialized": lambda: True}
    for verb, stand_in in verbs.items():
        monkeypatch.setattr(f"raybsa.experiments.budget.internal_kv._internal_kv_{verb}", stand_in)
    with Budget(10.0, "run") as budget:
        budget.on_step_end(0, [])
        assert not is_up(budget.question)
        clock[0] = 10.0
        budget.on_step_end(1, [])
        assert is_up(budget.question)
    assert not told, "nothing stays in the cluster"
    assert not is_up(Budget(math.inf, "endless").question)
