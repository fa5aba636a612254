"""Searches compared: the volume of a front, and how soon each search had it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from raybsa.experiments.convergence import course, fixed_seconds, main, table
from raybsa.experiments.foresight import table as foresight
from raybsa.experiments.previews import preview_of
from raybsa.results.hypervolume import Scale, hypervolume
from raybsa.results.pareto import LATENCY, named_objectives, quality_objective
from raybsa.results.record import SeriesPoint
from raybsa.results.store import Store
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec, canonical_json

GOALS = (quality_objective("min"), LATENCY)


@pytest.fixture
def trial(record):
    """A finished trial: quality, milliseconds, seconds of its worker, second at which it ended."""

    def make(name, quality, milliseconds, worker_s=10.0, ended=0, **changes):
        made = record(name, quality=quality, quality_goal="min", forward_backward_ms_p50=milliseconds)
        at = f"2026-01-01T00:{ended // 60:02d}:{ended % 60:02d}.000+00:00"
        return replace(made, worker_seconds=worker_s, created_at=at, run_id="run", **changes)

    return make


@pytest.mark.parametrize("sides", [1, 2, 3])
def test_a_hypervolume_is_the_share_of_grid_cells_that_some_point_dominates(sides):
    generator = np.random.default_rng(sides)
    points = [tuple(point) for point in generator.integers(0, 8, (6, sides)).tolist()]
    cells = itertools.product(range(7), repeat=sides)
    dominated = sum(any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells)
    assert hypervolume(points, (7,) * sides) == dominated


def test_a_better_front_has_more_volume_and_the_best_point_alone_has_all_of_it(trial):
    bad, good = [trial("a", 3.0, 8.0)], [trial("b", 2.0, 16.0), trial("c", 4.0, 4.0), trial("d", 3.0, 7.0)]
    scale = Scale([bad, good], GOALS)
    assert 0 < scale.volume(bad) < scale.volume(good) < scale.volume([trial("e", 2.0, 4.0)])
    assert scale.volume([trial("e", 2.0, 4.0)]) == pytest.approx(1.0)
    assert scale.volume([trial("f", 9.0, 9.0, status="failed")]) == 0


def test_fronts_without_a_point_cannot_be_compared(trial):
    with pytest.raises(ValueError, match="finished trials with quality, latency were wanted"):
        Scale([[trial("a", None, 8.0)]], GOALS)


def test_the_saving_is_told_in_seconds_of_workers_to_the_same_volume(trial):
    slow = [trial("a", 3.0, 8.0, 100), trial("b", 2.0, 4.0, 200, trained_steps=60), trial("c", 5.0, 9.0, 300)]
    fast = [trial("d", 2.0, 4.0, 50), trial("e", 1.9, 9.0, 50, status="pruned")]
    scale = Scale([slow, fast], GOALS)
    courses = [course("slow", slow, scale), course("fast", fast, scale)]
    assert courses[0].seconds == [100, 300, 600]
    assert courses[0].spent_to(courses[1].volumes[-1]) == (300, courses[0].steps[1])
    lines = table(courses, GOALS)
    assert "slow and fast: worker-seconds 300 and 50, ratio 6.00; training steps " in lines[-1]
    assert lines[2].split()[:3] == ["fast", "2", "1"]


def test_the_first_trial_within_the_bounds_is_counted_from_one(trial):
    records = [trial("a", 3.0, 8.0), trial("b", 2.5, 9.0), trial("c", 2.0, 4.0)]
    bounded = named_objectives(["quality<=2.5", "latency"], "min")
    found = course("x", records, Scale([records], GOALS))
    assert found.trials_to(bounded) == 2
    assert found.trials_to(named_objectives(["quality<=1"], "min")) is None


def test_a_trials_fixed_cost_is_what_lies_between_two_ends_beside_its_own_work(trial):
    records = [trial("a", 2, 2, 5, ended=10), trial("b", 2, 2, 5.5, ended=16), trial("c", 2, 2, 9.75, ended=26)]
    assert fixed_seconds(records) == pytest.approx(0.375)
    overlapping = [trial("a", 2, 2, 5, ended=10), trial("b", 2, 2, 5, ended=11)]
    assert fixed_seconds(overlapping) is None
    assert fixed_seconds(records[:1]) is None


def test_the_command_reads_results_folders_and_refuses_empty_ones(trial, tmp_path, capsys):
    store = Store.create(tmp_path)
    spec = canonical_json(TrialSpec("speed", (AttentionSpec("dense"),)).to_dict())
    store.write_record(trial("a", 3.0, 8.0, spec=spec))
    assert main([str(tmp_path)]) == 0
    assert str(tmp_path)[-20:] in capsys.readouterr().out
    other = Store.create(tmp_path / "other")
    other.write_record(trial("a", 3.0, 8.0, seq_len=999, spec=spec))
    with pytest.raises(ValueError, match="searches of one question were wanted"):
        main([str(tmp_path), other.root])
    with pytest.raises(ValueError, match=r"results of a search were wanted, found none under .*none"):
        main([str(tmp_path / "none")])


def test_foresight_tells_how_early_looks_would_have_ranked_the_trials(record):
    spec = TrialSpec("byte_lm", (AttentionSpec("base", PatternSpec("random"), 0.5, 16),), train_steps=90)
    generator = np.random.default_rng(0)
    ends, records, curves = generator.random(12), [], []
    for number, end in enumerate(ends.tolist()):
        asked = replace(spec, attention=(replace(spec.attention[0], density=0.1 + number / 20),))
        density, name = 0.1 + number / 20, f"t{number}"
        measured = {"density": density, "seed": 0, "quality_goal": "min", "pattern": "random"}
        whole = record(name, quality=end, **measured, trained_steps=90)
        look = record(f"p{number}", quality=2 * end + 1, **measured, status="pruned")
        records.append(replace(whole, spec=canonical_json(asked.to_dict())))
        records.append(replace(look, spec=canonical_json(preview_of(asked, "dense.pt").to_dict())))
        curves += [SeriesPoint(name, "train_loss", step, 0, end if step > 45 else -end) for step in range(90)]
    lines = [line.rsplit(maxsplit=3) for line in foresight(records, curves)]
    assert lines[1] == ["preview, nothing trained", "12", "1.00", "1.00"]
    by_share = {name.split()[-1]: (float(every), float(level)) for name, _, every, level in lines[2:]}
    assert by_share["33%"] == (-1.0, -1.0)
    assert by_share["100%"] == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least 8 finished sparse trials were wanted to rank, got 3"):
        list(foresight(records[:6], curves))
