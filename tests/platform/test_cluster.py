"""The coordinator and the search on a real local Ray: what a failure means, and that nothing measured is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raybsa.cluster.coordinator import Coordinator, WorkerNotMade
from raybsa.cluster.resources import Share, TooFewResources
from raybsa.experiments.search import Pool, search
from raybsa.experiments.space import SearchSpace
from raybsa.experiments.trial import Run, run_trial
from raybsa.results.pareto import named_objectives, pareto_front
from raybsa.results.record import Measurement
from raybsa.results.store import Store
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]  # Ray's and Tune's own
SPEC = TrialSpec("speed", (AttentionSpec("base", PatternSpec("sliding_window"), 0.5, 16),), seq_len=64, head_dim=8)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


class Scripted:
    """A worker that does what the seed says: 1 raises, 2 dies the first time, 3 dies always, 4 hangs."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def describe(self) -> str:
        return "scripted"

    def run(self, spec: TrialSpec) -> Measurement:
        if spec.seed == 1:
            raise ValueError("the spec asks for what does not fit")
        attempts = self._folder / str(spec.seed)
        with attempts.open("a") as file:
            file.write("x")
        if spec.seed == 3 or (spec.seed == 2 and len(attempts.read_text()) == 1):
            os._exit(1)
        if spec.seed == 4:
            time.sleep(60)
        return Measurement(density=spec.seed + 0.5)


def coordinator(folder: Path, **options: Any) -> Coordinator:
    path = str(folder)
    return Coordinator(Share(1), make=lambda device, arguments: Scripted(path), **options)


def asks(seed: int) -> TrialSpec:
    return TrialSpec("speed", SPEC.attention, seed=seed)


def actors_alive() -> int:
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    return int(2 - ray.available_resources().get("CPU", 0))


def test_a_trial_becomes_a_whole_record_on_disk(tmp_path: Path) -> None:
    store = Store.create(str(tmp_path))
    with Coordinator(Share(1), timing={"repeats": 5, "budget_s": 0.01}) as workers:
        record = run_trial(SPEC, workers, Run.start("test", "abc"), store=store)
    assert record.status == "ok"
    assert record.num_threads == 1
    assert record.git_commit == "abc"
    assert TrialSpec.from_dict(__import__("json").loads(record.spec)) == SPEC
    assert store.read_records() == [record]
    assert actors_alive() == 0


def test_a_trial_that_raises_fails_alone_and_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    said: list[str] = []
    with coordinator(tmp_path, num_workers=2, retries=2, say=said.append) as workers:
        outcomes = {outcome.spec.seed: outcome for outcome in workers.map([asks(seed) for seed in (0, 1, 2, 3, 5)])}
    assert outcomes[0].measurement == Measurement(density=0.5)
    assert outcomes[1].error == "ValueError: the spec asks for what does not fit"
    assert outcomes[2].measurement == Measurement(density=2.5)
    assert outcomes[2].failures == 1
    assert outcomes[3].measurement is None
    assert "died 3 times" in (outcomes[3].error or "")
    assert (tmp_path / "3").read_text() == "xxx"
    assert outcomes[5].measurement == Measurement(density=5.5)
    assert sum("fresh one" in text for text in said) == 3
    assert actors_alive() == 0


def test_a_trial_that_hangs_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    with coordinator(tmp_path, trial_s=1.0) as workers:
        assert "longer than 1 s" in (workers.run(asks(4)).error or "")
        assert workers.run(asks(0)).measurement == Measurement(density=0.5)


def test_too_few_resources_are_waited_for_and_then_named() -> None:
    said: list[str] = []
    started = time.monotonic()
    with pytest.raises(TooFewResources, match="1 worker of 64 CPU and 0 GPU wanted, the cluster has 2 CPU and 0 GPU"):
        Coordinator(Share(64), wait_s=1.0, say=said.append).__enter__()
    assert time.monotonic() - started < 10
    assert actors_alive() == 0


def test_a_worker_that_cannot_be_made_says_why() -> None:
    def make(device: str, arguments: dict[str, Any]) -> Any:
        raise ValueError("no such device")

    with pytest.raises(WorkerNotMade, match="no such device"):
        Coordinator(Share(1), make=make).__enter__()


def test_a_search_keeps_every_answer_and_survives_a_family_that_fails(tmp_path: Path) -> None:
    base = TrialSpec("speed", (AttentionSpec("dense"),), seq_len=128, num_layers=1, num_heads=2, head_dim=8)
    families = {"sliding_window": {}, "tests.platform.failing:Failing": {}}
    space = SearchSpace(base, families, densities=(0.2, 0.6), block_sizes=(16, 32))
    store = Store.create(str(tmp_path))
    on_disk: list[int] = []
    records = search(
        space,
        store,
        Run.start("test"),
        Pool(Share(1), 1, timing={"repeats": 5, "budget_s": 0.01}),
        trials=4,
        objectives=named_objectives(["latency", "memory"], None),
        tell=lambda record: on_disk.append(len(store.read_records())),
    )
    assert on_disk == [1, 2, 3, 4]
    assert {record.trial_id for record in store.read_records()} == {record.trial_id for record in records}
    by_pattern = {record.pattern: record for record in records}
    assert by_pattern["dense"].status == "ok"
    assert by_pattern["sliding_window"].status == "ok"
    failing = by_pattern["tests.platform.failing:Failing"]
    assert failing.status == "failed"
    assert "not today" in (failing.error or "")
    front = pareto_front(records, named_objectives(["latency", "memory"], None))
    assert front
    assert all(record.status == "ok" for record in front)
    assert actors_alive() == 0
