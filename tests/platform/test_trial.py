"""run_trial with a real worker in this very process: from the question to the files."""

from dataclasses import asdict, replace

import pytest

from raybsa.cluster.worker import Worker
from raybsa.experiments.recording import Run
from raybsa.experiments.trial import run_trial
from raybsa.results.record import Measured, Outcome
from raybsa.results.store import Store
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec

WINDOW = AttentionSpec("base", PatternSpec("sliding_window"), density=0.5, block_size=16)
SPEC = TrialSpec(
    "recall", (WINDOW,), seq_len=64, train_len=32, train_steps=3, num_layers=1, num_heads=1, head_dim=8, seed=3
)


class Here:
    """Stands for a Coordinator: its one worker needs no Ray."""

    def __init__(self):
        self.worker, self.measured = Worker(repeats=5, budget_s=0.01), []

    def run(self, spec):
        self.measured.append(self.worker.run(spec))
        return Outcome(spec, self.measured[-1], None, 0)


@pytest.fixture(scope="module")
def here():
    return Here()


def test_all_that_a_worker_measured_is_in_the_file_beside_what_was_asked(here, tmp_path):
    store = Store.create(tmp_path)
    record = run_trial(SPEC, here, Run("run", "test", "abc"), store=store)
    assert store.read_records() == [record]
    measured = asdict(here.measured[-1])
    curves, rank_curves = measured.pop("curves"), measured.pop("rank_curves")
    assert rank_curves == ()
    assert {name: getattr(record, name) for name in asdict(Measured())} == measured
    of_rings = {"world_size", "devices", "partition", "imbalance"}
    of_peers = ("host_ms", "layout_ms", "layout_bytes")
    others = {name for name in measured if name.startswith(("error_", "single_", "reference_error_"))}
    others |= {name for name in measured if name.endswith(("forward_bytes", *of_peers))}
    assert None not in [value for name, value in measured.items() if name not in of_rings | others]
    assert (record.task, record.pattern, record.block_size, record.seed) == ("recall", "sliding_window", 16, 3)
    assert (record.status, record.git_commit, record.spec_hash) == ("ok", "abc", SPEC.digest)
    assert [(point.trial_id, point.name, point.step, point.value) for point in store.read_series()] == [
        (record.trial_id, *point) for point in curves
    ]


def test_a_second_run_into_the_same_folder_adds_to_the_first(here, tmp_path):
    first, second = Run.start("test"), Run.start("test")
    for run in (first, second):
        for seed in (0, 1):
            run_trial(replace(SPEC, seed=seed), here, run, store=Store.create(tmp_path))
    records = Store(tmp_path).read_records()
    assert {(record.run_id, record.seed) for record in records} == {
        (run.run_id, seed) for run in (first, second) for seed in (0, 1)
    }
