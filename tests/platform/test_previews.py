"""A search that looks before it trains: what is looked at, what is trained of it, what counts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from raybsa.experiments.algorithms import ALGORITHMS
from raybsa.experiments.history import history
from raybsa.experiments.previews import PREVIEW, Previews, preview_of
from raybsa.experiments.questions import Questions
from raybsa.experiments.recording import Run, record_of
from raybsa.experiments.search import Plan
from raybsa.experiments.space import SearchSpace
from raybsa.results.pareto import DENSITY, LATENCY, quality_objective
from raybsa.results.record import Measurement, Outcome
from raybsa.spec import AttentionSpec, TrialSpec

BASE = TrialSpec("byte_lm", (AttentionSpec("dense"),), seq_len=512, train_len=256, train_steps=90)
SPACE = SearchSpace(BASE, {"sliding_window": {}, "random": {}, "strided": {}}, block_sizes=(16, 32))
GOALS = (quality_objective("min"), DENSITY)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pt"
    path.touch()
    return str(path)


def previews_on(weights, each=2, goals=GOALS):
    return Previews(SPACE, goals, weights, each, model=lambda: None)


def config(density, family="random"):
    return {"family": family, "density": density, "block_size": 16}


def looked(previews, *found):
    for density, quality in found:
        previews.learn(config(density), Measurement(quality=quality, density=density))


def densities(previews):
    found = []
    while chosen := previews.best():
        found.append(chosen["density"])
    return found


def test_what_adds_most_to_the_front_is_trained_first_and_what_is_beaten_never(weights):
    previews = previews_on(weights)
    previews.learn({"family": "dense"}, Measurement(quality=2.0, density=1.0))
    looked(previews, (0.4, 2.5), (0.1, 2.4), (0.3, 2.2), (0.05, 3.0), (0.35, 2.3))
    assert densities(previews) == [0.1, 0.3, 0.05]


def test_what_is_beaten_by_less_than_the_noise_is_trained_after_all_others(weights):
    previews = previews_on(weights)
    previews.learn({"family": "dense"}, Measurement(quality=2.0, density=1.0))
    looked(previews, (0.1, 2.4), (0.101, 2.401), (0.3, 2.2))
    assert densities(previews) == [0.3, 0.1, 0.101]


def test_density_stands_for_a_cost_that_cannot_be_predicted_yet_and_the_sampler_is_not_told(weights):
    previews = previews_on(weights, goals=(quality_objective("min"), LATENCY))
    for density, quality in ((0.1, 2.4), (0.3, 2.5), (0.2, 2.2)):
        assert previews.learn(config(density), Measurement(quality=quality, density=density)) is None
    assert sorted(densities(previews)) == [0.1, 0.2]


class Listener:
    """Stands for an algorithm; asks what it was given."""

    def __init__(self, configs):
        self.configs, self.told = iter(configs), []

    def ask(self, refused=0):
        return next(self.configs, None)

    def tell(self, config, values):
        self.told.append((config, values))


def ended(quality, density):
    return {
        "quality": quality,
        "density": density,
        "outcome": SimpleNamespace(measurement=Measurement(quality=quality, density=density)),
    }


def test_most_questions_are_only_looked_at_and_those_that_are_trained_count(weights, tmp_path):
    points = [{"family": "dense"}, *(config(density) for density in (0.5, 0.4, 0.3, 0.2))]
    listener = Listener(points)
    previews = previews_on(str(tmp_path / "none yet.pt"))
    questions = Questions(SPACE, listener, GOALS, trials=3, previews=previews)
    assert questions.suggest("0") == points[0], "there is nothing to borrow yet, so it is trained"
    questions.on_trial_complete("0", ended(2.0, 1.0))
    (tmp_path / "none yet.pt").touch()
    for name, quality in (("1", 2.1), ("2", 2.5)):
        asked = dict(questions.suggest(name))
        assert asked.pop(PREVIEW) == str(tmp_path / "none yet.pt")
        assert asked == points[int(name)]
        questions.on_trial_complete(name, ended(quality, asked["density"]))
    assert questions.suggest("3") == points[1], "the better of two"
    questions.on_trial_complete("3", ended(1.9, 0.5))
    assert [values for _, values in listener.told] == [[2.0, 1.0], [2.1, 0.5], [2.5, 0.4]], "by its look alone"
    assert [PREVIEW in questions.suggest(name) for name in "45"] == [True, True]
    questions.on_trial_complete("4", ended(2.2, 0.3))
    questions.on_trial_complete("5", ended(3.0, 0.2))
    assert questions.suggest("6") == points[3]
    assert questions.suggest("7") == "FINISHED", "three were trained"
    assert not questions.ended


def test_what_is_left_of_the_looks_is_trained_where_nothing_new_is_to_be_asked(weights):
    points = [config(0.5), config(0.3)]
    questions = Questions(SPACE, Listener(points), GOALS, trials=9, previews=previews_on(weights, each=50))
    for name, quality in (("0", 2.0), ("1", 2.2)):
        questions.on_trial_complete(name, ended(quality, questions.suggest(name)["density"]))
    assert sorted(questions.suggest(name)["density"] for name in "23") == [0.3, 0.5]
    assert questions.suggest("4") == "FINISHED"
    assert questions.ended


def test_a_resumed_search_knows_what_was_looked_at_and_what_was_trained(weights):
    def record(point, quality, number, of=lambda spec: spec, **changes):
        measured = Measurement(quality=quality, quality_goal="min", density=point.get("density", 1.0), **changes)
        return record_of(Outcome(of(SPACE.spec(point)), measured, None, 0), Run("run", "test"), f"run-{number}")

    def look(spec):
        return preview_of(spec, weights)

    points = [config(0.5), config(0.4), config(0.3), config(0.2)]
    records = [record({"family": "dense"}, 2.0, 0), record(points[0], 1.9, 3)]
    records += [
        record(point, quality, 9 + quality, look) for point, quality in zip(points, (2.1, 2.5, 2.2), strict=False)
    ]
    assert len(history(SPACE, records)) == 2
    earlier = history(SPACE, records, previews=True)
    questions = Questions(
        SPACE, Listener(points), GOALS, trials=4, earlier=earlier, previews=previews_on(weights, each=3)
    )
    assert questions.suggest("0")["density"] == 0.3, "three were looked at: one is trained already, one beaten"
    assert questions.suggest("1") == points[3] | {PREVIEW: weights}
    questions.on_trial_complete("1", ended(2.3, 0.2))
    assert questions.suggest("2") == points[3]
    assert questions.suggest("3") == "FINISHED"


def test_a_learned_pattern_is_not_looked_at_since_it_has_weights_of_its_own_to_learn(weights):
    previews = previews_on(weights)
    assert previews.of(config(0.3, "adaptive")) is None
    assert previews.of(config(0.3)) == config(0.3) | {PREVIEW: weights}
    assert previews.of({"family": "dense"}) is None


def test_previews_without_a_quality_to_look_at_are_refused():
    with pytest.raises(ValueError, match=r"previews are of quality, which must be an objective.*got 8 with latency"):
        Plan(9, (LATENCY,), previews=8)


def test_a_search_in_which_nothing_promises_anything_ends_and_says_so(weights):
    space = SearchSpace(replace(BASE, seq_len=2048, train_len=2048), {"random": {}}, block_sizes=(16,))
    previews = Previews(space, GOALS, weights, 1, model=lambda: None)
    questions = Questions(space, ALGORITHMS["random"](space, GOALS, 0), GOALS, trials=9, previews=previews)
    asked = 0
    while (point := questions.suggest(str(asked))) != "FINISHED":
        questions.on_trial_complete(str(asked), ended(2.0, point["density"]) if asked else ended(1.0, 0.01))
        asked += 1
    assert asked == 21, "the baseline, which beats all, and twenty that were only looked at"
    assert questions.ended
