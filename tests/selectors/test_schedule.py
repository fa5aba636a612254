"""Schedule: warm-up, annealing, and what is saved."""

import pytest

from raybsa.selectors.schedule import Schedule


def values(schedule: Schedule, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(schedule.value)
        schedule.step()
    return found


def test_it_stays_falls_by_equal_factors_and_stays():
    found = values(Schedule(1.0, 1 / 16, warmup=2, anneal=6, levels=3), 10)
    assert found == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 1 / 16, 1 / 16])


def test_without_steps_it_is_its_end():
    assert values(Schedule(1.0, 0.1), 2) == [0.1, 0.1]
    assert values(Schedule.constant(0.3), 2) == [0.3, 0.3]


def test_in_eval_mode_it_is_its_end():
    schedule = Schedule(1.0, 0.1, warmup=5)
    assert (schedule.value, schedule.eval().value, schedule.train().value) == (1.0, 0.1, 1.0)


def test_its_step_is_saved_and_loaded():
    schedule = Schedule(2.0, 1.0, warmup=3, anneal=2)
    values(schedule, 4)
    other = Schedule(2.0, 1.0, warmup=3, anneal=2)
    other.load_state_dict(schedule.state_dict())
    assert (other.count, other.value) == (4, schedule.value)


def test_numbers_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"got start=0, end=1, warmup=0, anneal=-1, levels=8"):
        Schedule(0, 1, anneal=-1)
