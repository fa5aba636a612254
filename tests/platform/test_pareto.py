"""The Pareto front of records."""

import random

import pytest

from raybsa.results.pareto import DENSITY, LATENCY, MEMORY, Objective, pareto_front, quality_objective


def test_the_front_holds_what_no_other_beats(record):
    good = record("good", quality=1.0, forward_backward_ms_p50=9.0)
    fast = record("fast", quality=3.0, forward_backward_ms_p50=1.0)
    beaten = record("beaten", quality=3.0, forward_backward_ms_p50=2.0)
    assert pareto_front([beaten, fast, good], [quality_objective("min"), LATENCY]) == [good, fast]


def test_a_quality_that_goes_up_is_better_when_larger(record):
    low, high = record("low", quality=0.2, density=0.1), record("high", quality=0.9, density=0.1)
    assert pareto_front([low, high], [quality_objective("max"), DENSITY]) == [high]


def test_equals_all_stay(record):
    twins = [record("a", quality=1.0), record("b", quality=1.0)]
    assert pareto_front(twins, [quality_objective("min")]) == twins


def test_failed_and_unmeasured_records_are_left_out(record):
    failed = record("failed", status="failed", quality=0.0, peak_bytes=1)
    blind = record("blind", quality=0.0)
    nan = record("nan", quality=float("nan"), peak_bytes=1)
    odd = [record(f"{value}", quality=value, peak_bytes=1) for value in (float("inf"), float("-inf"))]
    whole = record("whole", quality=5.0, peak_bytes=10)
    assert pareto_front([failed, blind, nan, *odd, whole], [quality_objective("min"), MEMORY]) == [whole]
    assert pareto_front([failed, blind, nan, *odd, whole], [quality_objective("max"), MEMORY]) == [whole]


def test_the_front_equals_its_definition_on_random_points(record):
    rng = random.Random(0)
    columns = ("quality", "forward_backward_ms_p50", "density")
    records = [record(f"r{i}", **{c: float(rng.randint(0, 5)) for c in columns}) for i in range(60)]
    objectives = [Objective(c, c, goal) for c, goal in zip(columns, ("max", "min", "min"), strict=True)]

    def beats(a, b):
        no_worse = a.quality >= b.quality and all(getattr(a, c) <= getattr(b, c) for c in columns[1:])
        return no_worse and any(getattr(a, c) != getattr(b, c) for c in columns)

    wanted = {r.trial_id for r in records if not any(beats(other, r) for other in records)}
    assert {r.trial_id for r in pareto_front(records, objectives)} == wanted
    assert 1 < len(wanted) < 60


def test_no_objective_is_refused(record):
    with pytest.raises(ValueError, match="at least one objective"):
        pareto_front([record()], [])
