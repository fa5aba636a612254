"""A front measured again: the same points by fresh means, and those that do not hold are named."""

import json
from dataclasses import replace

import pytest

from raybsa.experiments.validation import questions, verdicts
from raybsa.results.pareto import LATENCY, quality_objective
from raybsa.spec import AttentionSpec, PatternSpec, Ranks, TrialSpec, canonical_json

GOALS = (quality_objective("min"), LATENCY)


def spec_of(family, **changes):
    attention = AttentionSpec("base", PatternSpec(family), density=0.2, block_size=16)
    return TrialSpec("byte_lm", (attention,), train_steps=100, task_params={"text": None}, **changes)


@pytest.fixture
def point(record):
    def make(family, quality, milliseconds, spec=None, **changes):
        spec = spec or spec_of(family)
        made = record(f"{family}-{spec.seed}", spec=canonical_json(spec.to_dict()), pattern=family, quality=quality)
        return replace(made, seed=spec.seed, forward_backward_ms_p50=milliseconds, **changes)

    return make


def again(point, front, qualities, milliseconds):
    """Records of every question, with a family's qualities by seed."""
    specs, found = questions(front, 2, 3.0), []
    for spec in specs:
        family = spec.attention[0].pattern.name
        found.append(point(family, qualities[family][spec.seed % 2], milliseconds[family], spec))
    return found


def test_a_point_is_asked_again_with_new_seeds_more_steps_and_fresh_data(point):
    specs = questions([point("random", 2.0, 5.0), point("strided", 2.1, 4.0)], seeds=2, longer=1.5)
    assert [spec.attention[0].pattern.name for spec in specs] == ["random", "random", "strided", "strided"]
    assert [spec.train_steps for spec in specs] == [150] * 4
    assert len({spec.seed for spec in specs}) == 2
    assert all(spec.seed >= 1000 and spec.task_params == {"text": None, "eval_seed": spec.seed} for spec in specs)


def test_a_point_that_another_beats_by_more_than_the_seeds_spread_does_not_hold(point):
    front = [point("random", 2.0, 5.0), point("strided", 2.1, 4.0)]
    times = {"random": 5.0, "strided": 4.0}
    same = verdicts(front, again(point, front, {"random": (1.9, 2.1), "strided": (2.1, 2.2)}, times), GOALS)
    assert [verdict.why_not for verdict in same] == [None, None]
    lucky = verdicts(front, again(point, front, {"random": (2.3, 2.4), "strided": (2.1, 2.1)}, times), GOALS)
    assert [verdict.why_not for verdict in lucky] == ["beaten by strided-0 (strided)", None]
    assert lucky[0].before == [2.0, 5.0]
    assert lucky[0].after == pytest.approx([2.35, 5.0])
    assert lucky[0].spread == pytest.approx([0.05, 0.0])
    close = {"random": 4.0, "strided": 4.0}
    noisy = verdicts(front, again(point, front, {"random": (2.0, 2.4), "strided": (2.1, 2.1)}, close), GOALS)
    assert [verdict.why_not for verdict in noisy] == [None, None], "within the spread of the seeds"


def test_a_point_that_breaks_its_bound_or_cannot_be_measured_does_not_hold(point):
    front = [point("random", 2.0, 5.0), point("strided", 2.1, 4.0)]
    found = again(point, front, {"random": (2.0, 2.0), "strided": (2.1, 2.1)}, {"random": 6.0, "strided": 4.0})
    found = [replace(r, status="failed", error="lost") if r.pattern == "strided" else r for r in found]
    bounded = (GOALS[0], replace(LATENCY, most=5.5))
    reasons = [verdict.why_not for verdict in verdicts(front, found, bounded)]
    assert reasons == ["breaks the bound of latency", "no new trial of it came to its end"]


def test_a_point_whose_new_training_diverges_does_not_hold(point):
    front = [point("random", 2.0, 5.0)]
    found = again(point, front, {"random": (2.0, float("inf"))}, {"random": 5.0})
    (verdict,) = verdicts(front, found, GOALS)
    assert verdict.after == [2.0, 5.0]
    assert verdict.why_not == "its trial of seed 1001 measured an objective as infinite or not at all"


@pytest.mark.parametrize("arguments", [(0, 2.0), (2, 0.5)])
def test_fewer_seeds_than_one_or_a_shorter_training_are_refused(point, arguments):
    with pytest.raises(ValueError, match="at least one seed and a training at least as long"):
        questions([point("random", 2.0, 5.0)], *arguments)


def test_the_records_of_a_question_are_found_by_their_attention(point):
    front = [point("random", 2.0, 5.0)]
    assert json.loads(front[0].spec)["seed"] == 0
    assert verdicts(front, [], GOALS)[0].why_not == "no new trial of it came to its end"


def test_points_are_compared_seed_by_seed_since_a_seed_moves_all_of_them_alike(point):
    front = [point("random", 2.0, 5.0), point("strided", 2.1, 5.0)]
    qualities = {"random": (2.0, 3.0), "strided": (2.1, 3.1)}
    found = again(point, front, qualities, {"random": 5.0, "strided": 5.0})
    reasons = [verdict.why_not for verdict in verdicts(front, found, GOALS)]
    assert reasons == [None, "beaten by random-0 (random)"], "0.1 worse with either seed, which are 1 apart"


def test_points_that_only_differ_in_their_ranks_are_judged_apart(point):
    asked = [spec_of("random").over(Ranks(2, partition)) for partition in ("balanced", "zigzag")]
    front = [point("random", 2.0, 5.0, spec) for spec in asked]
    found = [
        point("random", 2.0, 4.0 if spec.ranks.partition == "zigzag" else 6.0, spec) for spec in questions(front, 2, 1)
    ]
    assert [verdict.after[1] for verdict in verdicts(front, found, GOALS)] == [6.0, 4.0]
