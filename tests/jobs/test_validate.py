"""What a search leaves behind is measured again: its front by jobs/validate.py, one point by --again. Without Ray."""

import json
import runpy
import sys
from contextlib import nullcontext
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
    monkeypatch.setattr("raybsa.cluster.coordinator.Coordinator", Here)
    monkeypatch.setattr("raybsa.experiments.launch.cluster", lambda address, verbose: nullcontext())
    monkeypatch.setattr("raybsa.experiments.launch.worker_share", lambda cpus: Share(cpus))
    monkeypatch.setattr("raybsa.experiments.launch.room_for", lambda share: 1)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(JOBS / name), run_name="__main__")
        return ended.value.code, capsys.readouterr().out

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
    code, _ = job("validate.py", tmp_path / "none", "--out", tmp_path / "out")
    assert code.startswith("error: a search with a Pareto front was wanted, found none under ")
    assert not (tmp_path / "out").exists()


def test_a_point_asked_again_has_its_quality_again(job, searched, tmp_path):
    code, told = job("search.py", "--again", searched / "front" / "01" / "best.json", "--out", tmp_path / "again")
    assert code == 0
    (record,) = Store(tmp_path / "again").read_records()
    before = {found.spec_hash: found.quality for found in Store(searched).read_records()}
    assert record.quality == pytest.approx(before[record.spec_hash], rel=1e-6)
    assert f"the search had quality <= 9 {record.quality:.4g}, density " in told
