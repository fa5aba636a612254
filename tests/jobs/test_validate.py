"""What a search leaves behind is measured again: its front by jobs/validate.py, one point by --again. Without Ray."""

import json
import runpy
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from raybsa.cluster.resources import Share
from raybsa.cluster.worker import Worker
from raybsa.experiments.front import write_front
from raybsa.experiments.presets import PRESETS
from raybsa.experiments.recording import Run, record_of
from raybsa.results.pareto import named_objectives
from raybsa.results.record import Outcome
from raybsa.results.store import Store
from raybsa.tasks.module import question_of

JOBS = Path(__file__).parents[2] / "jobs"
SPACE = PRESETS["quick"].space


class Here:
    """A coordinator whose one worker lives in this process."""

    def __init__(self, share, **_):
        self._worker = Worker("cpu", num_threads=share.num_cpus, repeats=5, budget_s=0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def run(self, spec):
        return Outcome(spec, self._worker.run(spec), None, 0)

    def map(self, specs):
        return map(self.run, specs)


@pytest.fixture
def job(monkeypatch, capsys):
    monkeypatch.setattr("raybsa.cluster.ring_coordinator.Coordinator", Here)
    monkeypatch.setattr("raybsa.experiments.launch.cluster", lambda address, verbose: nullcontext())
    monkeypatch.setattr("raybsa.experiments.launch.worker_share", lambda cpus, gpus: Share(cpus))
    monkeypatch.setattr("raybsa.experiments.launch.room_for", lambda share: 1)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(JOBS / name), run_name="__main__")
        shown = capsys.readouterr()
        return ended.value.code, shown.out + shown.err

    return run


@pytest.fixture
def searched(tmp_path):
    """A results folder with the dense baseline and a window on a front of quality and density."""
    store, run = Store.create(tmp_path / "search"), Run("search-1", "search")
    with Here(Share(1)) as coordinator:
        outcomes = coordinator.map([SPACE.spec(config) for config in SPACE.first_points()[:2]])
        records = [record_of(outcome, run, f"{run.run_id}-{n}") for n, outcome in enumerate(outcomes)]
    for record in records:
        store.write_record(record)
    assert write_front(store, records, named_objectives(["quality<=9", "density"], "min"))
    return Path(store.root)


def test_a_front_is_validated_by_the_objectives_of_its_search(job, searched, tmp_path):
    points = len(list(searched.glob("front/*")))
    code, told = job("validate.py", searched, "--out", tmp_path / "out", "--seeds", "2", "--longer", "1.5")
    assert code == 0
    assert f"{points} points, {2 * points} trials" in told
    verdicts = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert [set(verdict["after"]) for verdict in verdicts] == [{"quality", "density"}] * points
    assert all(verdict["holds"] == (verdict["why_not"] is None) for verdict in verdicts)
    records = Store(tmp_path / "out").read_records()
    assert {record.seed for record in records} == {1000, 1001}
    assert {record.trained_steps for record in records} == {15}


def test_a_folder_without_a_front_is_not_validated(job, tmp_path):
    code, told = job("validate.py", tmp_path / "none", "--out", tmp_path / "out")
    assert code == 2
    assert told.startswith("jobs/validate.py: a search with a Pareto front was wanted, found none under ")
    assert told.endswith("(--resume); --objectives quality,latency takes its trials as they are\n")
    assert not (tmp_path / "out").exists()


def test_a_point_asked_again_has_its_quality_again(job, searched, tmp_path):
    code, told = job("search.py", "--again", searched / "front" / "01" / "best.json", "--out", tmp_path / "again")
    assert code == 0
    (record,) = Store(tmp_path / "again").read_records()
    before = {found.spec_hash: found.quality for found in Store(searched).read_records()}
    assert record.quality == pytest.approx(before[record.spec_hash], rel=1e-6)
    assert f"the search had quality <= 9 {record.quality:.4g}, density " in told


OWN = """
import torch
from torch import nn

def question(seed):
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    batches = [torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(seed + n)) for n in range(2)]
    return model, batches, lambda model, x: (model(x, x, x)[0] - x).square().mean(), batches[:1]
"""


def test_a_point_of_one_s_own_module_is_measured_again_with_the_seeds_of_its_function(job, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    base = question_of(f"{tmp_path / 'mine.py'}:question", replace(SPACE.base, train_steps=2))
    space = replace(SPACE, base=base, families={"random": {}}, block_sizes=(8,))
    run, goals = Run("search-1", "search"), named_objectives(["quality", "density"], "min")
    store = Store.create(tmp_path / "search")
    with Here(Share(1)) as coordinator:
        outcomes = coordinator.map([space.spec(config) for config in space.first_points()])
        records = [record_of(outcome, run, f"{run.run_id}-{n}") for n, outcome in enumerate(outcomes)]
    for record in records:
        store.write_record(record)
    path = write_front(store, records, goals)[0]
    code, told = job("validate.py", store.root, "--out", tmp_path / "out", "--seeds", "2", "--longer", "1.5")
    assert code == 0, told
    again = Store(tmp_path / "out").read_records()
    assert {(record.status, record.seed, record.trained_steps) for record in again} == {
        ("ok", 1000, 3),
        ("ok", 1001, 3),
    }
    assert len({record.quality for record in again}) == len(again), "another seed is another model and other data"
    code, told = job("search.py", "--again", path, "--out", tmp_path / "again")
    (asked,) = Store(tmp_path / "again").read_records()
    assert code == 0
    assert asked.quality == pytest.approx(next(r.quality for r in records if r.spec_hash == asked.spec_hash), rel=1e-5)
