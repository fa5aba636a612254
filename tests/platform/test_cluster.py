"""Coordinator and search on a real, small Ray cluster: failures, waits, and nothing left behind."""

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.exceptions import OutOfMemoryError

from raybsa.cluster.coordinator import Coordinator, WorkerNotMade
from raybsa.cluster.resources import Share, TooFewResources, await_resources, why_not_up
from raybsa.experiments.front import write_front
from raybsa.experiments.recording import Run
from raybsa.experiments.search import Plan, Pool, search
from raybsa.experiments.space import SearchSpace
from raybsa.experiments.trial import run_trial
from raybsa.experiments.validity import NO_RULE
from raybsa.layout import BlockLayout
from raybsa.patterns import save_blocks
from raybsa.results.pareto import named_objectives
from raybsa.results.store import Store
from raybsa.spec import AttentionSpec, TrialSpec
from raybsa.tasks.module import question_of

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("everything_is_given_back")]
SPEC = TrialSpec("speed", (AttentionSpec("dense"),), seq_len=128, num_layers=1, num_heads=1, head_dim=8)


@pytest.fixture
def scripted(tmp_path):
    """Makes workers that act out a trial's ``seed``: 0 answers, 1 always dies, 2 dies once, 3 raises, 4 hangs.

    Each attempt leaves a mark ``seed-attempt`` in ``tmp_path``, so that a test sees that a fault truly came.
    """
    folder = str(tmp_path)

    def make(device, arguments):
        import os
        import time

        from raybsa.results.record import Measurement

        class Scripted:
            def describe(self):
                return "scripted"

            def run(self, spec):
                attempt = len([name for name in os.listdir(folder) if name.startswith(f"{spec.seed}-")])
                open(os.path.join(folder, f"{spec.seed}-{attempt}"), "w").close()
                if spec.seed == 1 or (spec.seed == 2 and attempt == 0):
                    os._exit(7)
                if spec.seed == 3:
                    raise ValueError("no such thing")
                if spec.seed == 4:
                    time.sleep(600)
                return Measurement(density=float(os.getpid()))

        return Scripted()

    make.attempts = lambda seed: len(list(tmp_path.glob(f"{seed}-*")))
    return make


def asked(*seeds):
    return [replace(SPEC, seed=seed) for seed in seeds]


def test_a_trial_whose_worker_dies_goes_to_a_fresh_one_and_the_others_go_on(scripted):
    said = []
    with Coordinator(Share(), num_workers=2, retries=2, make=scripted, say=said.append) as coordinator:
        outcomes = {outcome.spec.seed: outcome for outcome in coordinator.map(asked(0, 2, 3, 1, 0))}
    assert outcomes[0].error is None
    assert outcomes[2].error is None
    assert outcomes[2].failures == 1
    assert (outcomes[1].measurement, outcomes[1].failures) == (None, 3)
    assert "its worker died 3 times" in outcomes[1].error
    assert (outcomes[3].error, outcomes[3].failures) == ("ValueError: no such thing", 0)
    assert [scripted.attempts(seed) for seed in (0, 1, 2, 3)] == [2, 3, 2, 1]
    assert sum("its trial goes to a fresh one" in text for text in said) == 3


def test_a_worker_stays_warm_from_trial_to_trial_even_through_an_error(scripted):
    with Coordinator(Share(), make=scripted) as coordinator:
        first, error, second = (coordinator.run(spec) for spec in asked(0, 3, 0))
    assert error.error
    assert first.measurement.density == second.measurement.density, "the same process answered"


def test_a_trial_that_takes_too_long_has_failed_and_the_next_one_runs(scripted):
    with Coordinator(Share(), make=scripted, trial_s=2.0) as coordinator:
        late, next_one = coordinator.map(asked(4, 0))
    assert late.error == "took longer than 2 s"
    assert next_one.error is None


def test_workers_of_a_stream_that_nobody_reads_to_its_end_are_given_back(scripted):
    with Coordinator(Share(), num_workers=2, make=scripted) as coordinator:
        outcomes = coordinator.map(asked(0, 4, 0, 0))
        assert next(outcomes).spec.seed == 0
        outcomes.close()


def test_too_few_resources_are_named_after_a_bounded_wait(monkeypatch):
    monkeypatch.setattr("raybsa.cluster.resources._SAY_EVERY_S", 0.1)
    said = []
    start = time.monotonic()
    with pytest.raises(TooFewResources, match=r"2 workers of 8 CPU and 0 GPU wanted, the cluster has 6 CPU and 0 GPU"):
        await_resources(Share(8), 2, wait_s=1.0, say=said.append)
    assert 1 <= time.monotonic() - start < 10
    assert "waiting up to" in said[0]
    with pytest.raises(TooFewResources, match=r"1 worker of 1 CPU and 1 GPU wanted.*gave up after 0\.5 s"):
        Coordinator(Share(1, 1), wait_s=0.5).__enter__()


@pytest.mark.parametrize(
    ("nodes", "free", "why"),
    [
        ([6], 2, "the cluster is too small for all"),
        ([3, 3, 3], 9, "the cluster is too small for all"),
        ([8], 0, "still starting"),
        ([8, 8], 8, "still starting"),
        ([16], 4, "still starting"),
        ([8, 4], 1, "still starting, or waiting for what others hold"),
    ],
)
def test_workers_that_are_slow_to_start_are_told_from_those_that_lack_resources(nodes, free, why):
    assert why_not_up(Share(4), 2, [{"CPU": cpus} for cpus in nodes], {"CPU": free}) == why


def test_a_slow_start_is_not_called_a_lack_of_resources():
    def make(device, arguments):
        time.sleep(30.0)

    wanted = r"1 worker of 1 CPU .*the cluster has 6 CPU .*; 0 up, 1 not: still starting; gave up after 1 s"
    with pytest.raises(TooFewResources, match=wanted):
        Coordinator(Share(), make=make, wait_s=1.0).__enter__()


def test_a_worker_that_cannot_be_made_is_an_error_with_its_reason():
    def make(device, arguments):
        raise ImportError("no libfoo on this node")

    with pytest.raises(WorkerNotMade, match=r"1 CPU and 0 GPU could not be made: .*no libfoo on this node"):
        Coordinator(Share(), make=make).__enter__()
    outcome = Coordinator(Share(), make=make).run(SPEC)
    assert "no libfoo on this node" in outcome.error


def test_a_worker_with_other_versions_than_the_driver_is_not_made(monkeypatch):
    monkeypatch.setattr("raybsa.cluster.coordinator.versions", lambda: {"torch": "1.0"})
    with pytest.raises(WorkerNotMade, match=r"VersionMismatch: machine .* has torch .* instead of 1\.0"):
        Coordinator(Share()).__enter__()


def test_a_worker_that_cannot_say_what_it_is_is_an_error_with_its_reason():
    class Mute:
        def describe(self):
            raise RuntimeError("the driver is too old")

    with pytest.raises(WorkerNotMade, match="the driver is too old"):
        Coordinator(Share(), make=lambda device, arguments: Mute()).__enter__()


def test_a_worker_that_ray_killed_for_its_memory_counts_as_one_that_died(scripted, monkeypatch):
    """Ray reports it by an error of its own that is no RayActorError."""
    said, errors, get = [], [OutOfMemoryError("the node ran low on memory")] * 3, ray.get

    def get_or_fail(references, **options):
        if options.get("timeout") == 0 and errors:
            raise errors.pop()
        return get(references, **options)

    with Coordinator(Share(), retries=1, make=scripted, say=said.append) as coordinator:
        monkeypatch.setattr("raybsa.cluster.coordinator.ray.get", get_or_fail)
        lost, survived = coordinator.map(asked(0, 0))
    assert (lost.failures, lost.error) == (2, "its worker died 2 times: the node ran low on memory")
    assert (survived.failures, survived.error) == (1, None)
    assert sum("its trial goes to a fresh one" in text for text in said) == 2


def test_run_trial_records_the_answer_and_the_failures_that_it_survived(scripted, tmp_path):
    store = Store.create(tmp_path / "results")
    run = Run("run", "test", "abc123")
    with Coordinator(Share(), make=scripted, say=lambda text: None) as coordinator:
        survived = run_trial(asked(2)[0], coordinator, run, store=store)
        failed = run_trial(asked(3)[0], coordinator, run, store=store, trial_id="run-b")
    assert (survived.status, survived.failures_survived, survived.git_commit) == ("ok", 1, "abc123")
    assert (failed.status, failed.error, failed.density) == ("failed", "ValueError: no such thing", None)
    assert {record.trial_id: record for record in store.read_records()} == {
        survived.trial_id: survived,
        "run-b": failed,
    }
    assert TrialSpec.from_dict(json.loads(survived.spec)) == asked(2)[0]


def test_a_search_records_every_trial_at_once_and_outlives_those_that_fail(tmp_path, monkeypatch):
    """One family lists its blocks for another length and is never asked; one variant fails, with the reason."""
    elsewhere = str(tmp_path / "blocks.parquet")
    save_blocks(BlockLayout.from_rows([[0]], q_len=16, kv_len=16, q_block_size=16), elsewhere)
    families = {"sliding_window": {}, "blocks": {"path": [elsewhere]}, "random": {}}
    store, stored_when_told = Store.create(tmp_path / "results"), []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # another search may run on this machine

    def tell(record):
        stored_when_told.append(record in store.read_records())

    monkeypatch.setattr("raybsa.experiments.space.VARIANTS", ("base", "no_such"))
    found = search(
        SearchSpace(SPEC, families, block_sizes=(16,), densities=(0.3, 0.9), variants=("base", "no_such")),
        store,
        Run("run", "test"),
        Pool(Share(), num_workers=2, timing={"repeats": 5, "budget_s": 0.01}),
        Plan(8, named_objectives(["latency", "density"], None)),
        tell=tell,
    )
    records = found.records
    assert stored_when_told == [True] * 8
    assert sorted(record.trial_id for record in records) == [f"run-{i:03d}" for i in range(8)]
    by_id = {record.trial_id: record for record in records}
    assert [by_id[f"run-00{i}"].pattern for i in range(3)] == ["dense", "sliding_window", "random"]
    assert "blocks" not in {record.pattern for record in records}
    assert NO_RULE in found.rejected
    assert {record.status for record in records} == {"ok", "failed"}
    for record in records:
        assert (record.status == "failed") == (record.variant == "no_such"), record.error
        assert record.error is None or "got 'no_such'" in record.error
    assert sorted(os.listdir(tmp_path)) == ["blocks.parquet", "results"], "nothing of Tune's stays"


def test_a_search_that_looks_first_trains_what_promises_most_and_keeps_both_apart(tmp_path, monkeypatch):
    store = Store.create(tmp_path / "results")
    base = replace(SPEC, task="recall", train_len=32, train_steps=2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = search(
        SearchSpace(base, {"sliding_window": {}, "random": {}}, block_sizes=(8,), densities=(0.3, 0.9)),
        store,
        Run("run", "test"),
        Pool(Share(), timing={"repeats": 5, "budget_s": 0.01}),
        Plan(3, named_objectives(["quality", "density"], "max"), previews=2),
    )
    records = store.read_records()
    looked = {record.pattern for record in records if record.status == "pruned"}
    assert [record.status for record in found.records] == ["ok"] * 3
    assert looked == {"sliding_window", "random"}
    assert all(record.trained_steps == 0 and record.forward_ms_p50 is None for record in records if record.error)
    assert len(records) > len(found.all) == 3


OWN = """
import torch
from torch import nn

def question(seed):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), 2)
    batches = (torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(seed + n)) for n in range(99))
    return model, batches, lambda model, x: (model(x) - x.roll(1, 1)).square().mean()
"""


def test_a_search_on_a_module_of_one_s_own_whose_layers_may_differ(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    base = question_of(f"{tmp_path / 'mine.py'}:question", replace(SPEC, train_steps=2))
    space = SearchSpace(base, {"sliding_window": {}, "random": {}}, (0.5, 0.8), (8,), per_layer=True)
    store, goals = Store.create(tmp_path / "results"), named_objectives(["quality", "density"], "min")
    pool = Pool(Share(), timing={"repeats": 5, "budget_s": 0.01})
    records = search(space, store, Run("run", "test"), pool, Plan(4, goals)).records
    assert [record.status for record in records] == ["ok"] * 4
    assert {record.quality_name for record in records} == {"held_out_loss"}
    assert [record.pattern for record in records] == ["dense", "sliding_window", "random", "sliding_window/random"]
    for path in write_front(store, records, goals):
        best = json.loads(Path(path).read_text())
        assert len(best["layers"]) == 2
        assert isinstance(best["attention"], list) == (len(best["spec"]["attention"]) == 2)
