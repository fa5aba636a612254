"""Reading a results folder and grouping what may be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest

from dashboards.figures.pictures import drawing_info
from dashboards.frames import Results, load, trial_of
from dashboards.sections.header import header
from dashboards.wording import EARLIER_DENSITY
from raybsa.results.record import Record, SeriesPoint
from raybsa.results.store import Store
from raybsa.spec import Ranks, TrialSpec
from tests.dashboards.made import DENSE, curve, lm_failure, lm_record, record, sparse, speed_record


def results_of(*records: Record) -> Results:
    return Results(tuple(map(trial_of, records)), {})


def test_what_was_stored_is_what_is_read(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    wanted = lm_record("a", sparse("bigbird"), 2.3, 9.0)
    store.write_record(wanted)
    store.write_series(curve("a", "train_loss", 2.3, steps=20))
    results = load(str(tmp_path))
    assert [trial.record for trial in results.trials] == [wanted]
    assert results.trials[0].spec.layer(0) == sparse("bigbird")
    assert [point.step for point in results.series["a"]] == [0, 10, 20]


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_an_empty_folder_is_an_error_that_names_what_to_run(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"found none under .*jobs/search.py .*jobs/benchmark.py"):
        load(str(tmp_path / folder))


def test_a_spec_that_cannot_be_read_names_its_trial() -> None:
    broken = replace(lm_record("odd-one", DENSE, 2.0, 9.0), spec='{"task": "byte_lm"}')
    with pytest.raises(ValueError, match="odd-one"):
        trial_of(broken)


def test_only_trials_of_one_question_on_one_device_are_compared() -> None:
    longer = TrialSpec("byte_lm", (sparse("bigbird"),), train_steps=400)
    results = results_of(
        lm_record("a", sparse("bigbird"), 2.3, 9.0),
        lm_record("b", DENSE, 2.2, 40.0),
        lm_record("elsewhere", DENSE, 2.2, 4.0, device_name="NVIDIA H100"),
        record("longer", longer, quality=2.0, quality_name="bits_per_byte", quality_goal="min"),
    )
    assert [sorted(t.id for t in group) for group in results.quality_groups] == [["a", "b"], ["elsewhere"], ["longer"]]


def test_seeds_of_one_question_are_compared() -> None:
    specs = [TrialSpec("byte_lm", (sparse("bigbird"),), seed=seed) for seed in (0, 1)]
    results = results_of(*(record(f"seed-{s.seed}", s, quality=2.0) for s in specs))
    assert len(results.quality_groups) == 1


def test_rings_of_a_search_are_compared_with_one_worker_and_say_what_they_are() -> None:
    alone = TrialSpec("byte_lm", (sparse("bigbird"),))
    rings = [alone.over(Ranks(2, "zigzag")), alone.over(Ranks(4, codec={"name": "int8"}))]
    results = results_of(*(record(f"trial-{n}", spec, quality=2.0) for n, spec in enumerate([alone, *rings])))
    (group,) = results.quality_groups
    assert [trial.label.replace("\u00a0", " ") for trial in group] == [
        "bigbird · 10 %",
        "bigbird · 10 % · 2 ranks, zigzag",
        "bigbird · 10 % · 4 ranks, balanced, int8",
    ]


def test_points_of_a_curve_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    store = Store.create(tmp_path)
    store.write_record(lm_record("a", DENSE, 2.3, 9.0))
    store.write_series(SeriesPoint("a", "train_loss", step, 0, value) for step, value in enumerate((2.0, inf, nan)))
    assert [point.value for point in load(str(tmp_path)).series["a"]] == [2.0]


def test_failures_and_unfinished_qualities_stay_out_of_the_comparison() -> None:
    results = results_of(
        lm_record("good", DENSE, 2.2, 40.0),
        lm_record("diverged", sparse("bigbird"), float("inf"), 9.0),
        lm_failure("failed", sparse("strided"), "ValueError: no"),
        speed_record("speed", sparse("bigbird"), 1024),
    )
    assert [[t.id for t in group] for group in results.quality_groups] == [["good"]]
    assert [trial.id for trial in results.failures] == ["failed"]
    assert [[t.id for t in group] for group in results.speed_groups] == [["speed"]]


def test_a_density_is_the_one_asked_for_or_else_the_measured_one() -> None:
    asked = lm_record("asked", sparse("bigbird", 0.1), 2.3, 9.0, density=0.1034)
    own = lm_record("own", sparse("bigbird", None), 2.3, 9.0, density=0.0721)
    assert [trial_of(r).density for r in (asked, own)] == [0.1, 0.0721]


def test_rows_of_an_earlier_meaning_of_density_stand_apart_and_are_marked() -> None:
    now = lm_record("now", sparse("strided", 0.1), 2.3, 9.0)
    spec = replace(trial_of(now).spec, density_meaning=1)
    earlier = replace(now, trial_id="then", spec=json.dumps(spec.to_dict()), spec_hash=spec.digest)
    results = results_of(now, earlier, lm_record("dense", DENSE, 2.2, 40.0))
    groups = [[trial.id for trial in group] for group in results.quality_groups]
    assert sorted(groups) == [["now", "dense"], ["then", "dense"]], "the baseline stands beside both"
    then = next(trial for trial in results.trials if trial.id == "then")
    assert then.label.endswith("of each row")
    assert drawing_info(then.spec).problem == f"not drawn: {EARLIER_DENSITY}"
    assert then.sizes == ()
    assert "Earlier rows" in str(header(results, "here"))
