"""What a drill plans, and how it judges what it saw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from raybsa.cluster.faults import FROM_OUTSIDE, Fault, FaultKind, FaultPlace, mark
from raybsa.cluster.journal import Recovery
from raybsa.cluster.member import MemberSettings
from raybsa.experiments.census import Census
from raybsa.experiments.drill import Survived, survived
from raybsa.experiments.drill_plan import EVERY, KINDS, groups, kinds_on, left_out_on, plan_of, soak_plan, steps_for
from raybsa.experiments.drill_summary import STRUCK_AGAIN, line_of, summaries, verdict
from raybsa.experiments.launch import without_rays_messages
from raybsa.experiments.soak import Soaked


def test_every_kind_is_drilled_or_left_out_with_a_reason() -> None:
    for device in ("cpu", "cuda"):
        assert {*kinds_on(device), *left_out_on(device)} == {*FaultKind}
        assert not {*kinds_on(device)} & {*left_out_on(device)}
    assert FaultKind.CUDA_ERROR in kinds_on("cuda")
    assert set(FROM_OUTSIDE) <= {*FaultKind}


def test_who_kills_the_driver_has_a_run_of_its_own() -> None:
    exits, driver = [(FaultKind.EXIT, place) for place in FaultPlace], (FaultKind.DRIVER, FaultPlace.EXCHANGE)
    grouped = groups([*exits[:2], driver, *exits[2:]], 4)
    assert [len(group) for group in grouped] == [4, 3, 1]
    assert grouped[-1] == [driver]


def test_a_plan_strikes_once_a_generation_and_always_after_a_checkpoint() -> None:
    pairs = [(FaultKind.SIGKILL, place) for place in FaultPlace]
    plan = plan_of(pairs, 4, Random(0))
    assert len(plan) == len(pairs) + 1, "a fault while recovering needs one to recover from"
    steps = [faults[0].step for faults in plan if faults[0].step >= 0]
    assert steps == sorted(set(steps))
    assert steps[0] > EVERY
    assert max(steps) < steps_for(pairs)


def test_a_soak_draws_the_same_faults_from_a_seed_and_each_leaves_its_own_mark(tmp_path: Path) -> None:
    plan, steps = soak_plan(200, 4, seed=3)
    assert soak_plan(200, 4, seed=3) == (plan, steps)
    assert soak_plan(200, 4, seed=4)[0] != plan
    faults = [fault for (fault,) in plan]
    assert {fault.kind for fault in faults} == {*KINDS} - {FaultKind.DRIVER}
    assert {fault.place for fault in faults} == {*FaultPlace}
    assert faults[0].place is not FaultPlace.RECOVERY
    for fault in faults:
        mark(str(tmp_path), fault)
    assert len(list(tmp_path.iterdir())) == 200
    assert max(fault.step for fault in faults) < steps


def test_a_fault_that_never_struck_is_not_survived(tmp_path: Path) -> None:
    plan = [(Fault(FaultKind.EXIT, FaultPlace.EXCHANGE, 0, 5),), (Fault(FaultKind.EXIT, FaultPlace.EXCHANGE, 0, 9),)]
    mark(str(tmp_path), plan[0][0])
    recovery = Recovery(1, ((0, "gone"),), 5.0, 5.5, 5, 0, "spare", 4, filled_at=5.1, formed_at=5.4)
    first, second = survived(plan, MemberSettings(marks=str(tmp_path)), [recovery], equal=True)
    assert (first.good, first.resumed_in_s, first.filled) == (True, 0.5, "spare")
    assert not second.good
    (unequal, _) = survived(plan, MemberSettings(marks=str(tmp_path)), [recovery], equal=False)
    assert not unequal.good


def test_a_fault_that_only_begins_a_recovery_to_strike_in_is_counted_beside_those_that_were_asked_for(
    tmp_path: Path,
) -> None:
    plan = plan_of([(FaultKind.SIGKILL, FaultPlace.EXCHANGE), (FaultKind.SPARE, FaultPlace.RECOVERY)], 4, Random(0))
    for (fault,) in plan:
        mark(str(tmp_path), fault)
    recoveries = [
        Recovery(1, ((0, "gone"),), 5.0, 5.5, 5, 0, "spare", 4, filled_at=5.1, formed_at=5.4),
        Recovery(2, ((0, "gone"),), 8.0, 11.0, 9, 0, "fresh", 4, filled_at=9.0, formed_at=10.0),
    ]
    rows = list(survived(plan, MemberSettings(marks=str(tmp_path)), recoveries, equal=True))
    assert [row.struck_again for row in rows] == [False, True, False]
    assert verdict(rows) == "2 of 2 faults as wanted (1 of 1 beside them, which began a recovery to strike in)"
    assert verdict([replace(rows[0], equal=False)]) == "0 of 1 faults as wanted"
    assert [(found.what, found.faults) for found in summaries(rows)] == [("sigkill", 1), (STRUCK_AGAIN, 1)]


def test_each_kind_has_its_median_and_worst_by_how_the_ring_was_filled() -> None:
    fault = Fault(FaultKind.SIGSTOP, FaultPlace.EXCHANGE, 0, 5)
    fills = ["spare", "fresh", "shrunk", "fresh"]
    rows = [Survived(fault, 1.0 + i, 0.1 * (i + 1), 0, filled, True) for i, filled in enumerate(fills)]
    never = Survived(fault, None, None, 0, "-", True)
    (summary,) = summaries([*rows, never])
    assert line_of(summary).split() == ["sigstop", "4", "2.500", "(4.000)", "0.100", "(0.100)", "0.300", "(0.400)"]
    assert line_of(summary._replace(with_spare=[])).split()[4:] == ["-", "0.300", "(0.400)"]


def test_what_ray_says_of_dead_workers_is_only_printed_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ray._private.worker import print_to_stdstream

    def report(words: str) -> str:
        print_to_stdstream({"lines": [words], "pid": "raylet", "is_err": False}, ignore_prefix=False)
        return capsys.readouterr().out

    with without_rays_messages():
        assert not report("A worker died, for nobody to hear.")
    assert "A worker died, again." in report("A worker died, again.")


NOTHING = Census(*(frozenset() for _ in range(6)))


def test_a_census_names_what_was_left_behind() -> None:
    after = Census(
        members=frozenset({"17"}),
        ports=frozenset({"4711"}),
        threads=frozenset(),
        descriptors=frozenset({"socket:[1]"}),
        shared_memory=frozenset({"nobody-holds-this"}),
        temporary=frozenset({"raybsa-x"}),
    )
    assert after.left_since(NOTHING) == {
        "members": ["17"], "ports": ["4711"], "descriptors": ["socket:[1]"], "shared_memory": ["nobody-holds-this"],
        "temporary": ["raybsa-x"],
    }  # fmt: skip
    assert after.left_since(after) == {}


@pytest.mark.parametrize(
    ("left", "last", "good"), [({}, 100.0, True), ({"ports": ["1"]}, 100.0, False), ({}, 900.0, False)]
)
def test_a_soak_is_good_where_nothing_stays_and_memory_is_flat(left: dict, last: float, good: bool) -> None:
    assert Soaked((), left, (90.0, 100.0, 100.0, last), 1.0).good is good
