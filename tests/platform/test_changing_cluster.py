"""A search goes on while its cluster grows and loses a node: rings of Ray actors on half a CPU a rank."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from raybsa.cluster.nodes import processes, raylet_of
from raybsa.cluster.resources import Share
from raybsa.experiments.recording import Run
from raybsa.experiments.search import Plan, Pool, search
from raybsa.experiments.space import SearchSpace
from raybsa.results.pareto import named_objectives
from raybsa.results.store import Store
from raybsa.spec import AttentionSpec, TrialSpec

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
LEAN = {"object_store_memory": 100 << 20, "include_log_monitor": False}
SOON = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


@pytest.fixture
def cluster(no_ray: None) -> Iterator[Cluster]:
    """The driver's node, which offers nothing, and one of a CPU. A node that is lost is missed soon."""
    head = {"num_cpus": 0, "include_dashboard": False, "no_monitor": True, "_system_config": SOON}
    made = Cluster(initialize_head=True, head_node_args=head | LEAN, shutdown_at_exit=False)
    try:
        made.add_node(num_cpus=1, **LEAN)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def test_a_search_of_rings_uses_a_node_that_comes_and_loses_no_question_with_a_node_that_goes(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    params = {"text": str(tmp_path / "text.txt"), "train_batch": 1, "eval_windows": 2}
    base = TrialSpec(
        "byte_lm", (AttentionSpec("dense"),), seq_len=64, train_len=64, train_steps=40, num_layers=1, num_heads=1,
        head_dim=16, task_params=params,
    )  # fmt: skip
    space = SearchSpace(
        base, {"sliding_window": {}}, densities=(0.4, 0.4), block_sizes=(8,), world_sizes=(2,), codecs=("none", "int8")
    )
    store = Store.create(tmp_path / "results")
    changes = threading.Thread(target=grow_and_lose, args=(cluster,), daemon=True)
    changes.start()
    found = search(
        space,
        store,
        Run("run", "test"),
        Pool(Share(0.5), None, timing={"repeats": 3, "budget_s": 0.01}),
        Plan(3, named_objectives(["quality", "wire"], "min")),
        say=lambda text: None,
    )
    changes.join()
    assert [node["Alive"] for node in ray.nodes()].count(False) == 1, "a node was truly lost"
    rings = {record.trial_id: record for record in found.records if record.world_size == 2}
    assert sorted(record.trial_id for record in found.records) == ["run-000", "run-001", "run-002"]
    assert {record.status for record in found.records} == {"ok"}
    assert sum(record.failures_survived for record in rings.values()) >= 1
    plain, small = sorted(rings.values(), key=lambda record: -record.wire_bytes)
    assert 0 < small.wire_bytes < 0.5 * plain.wire_bytes
    assert small.quality == pytest.approx(plain.quality, rel=0.1)
    assert plain.wire_forward_bytes == plain.needed_forward_bytes


def grow_and_lose(cluster: Cluster) -> None:
    """A second node once a trial has begun on the first, and its end while a ring computes on it."""
    deadline = time.monotonic() + 120
    wait_until(lambda: bool(processes_of("ray::_Host")), deadline)
    node = cluster.add_node(num_cpus=1, **LEAN)
    raylet = raylet_of(node.node_id)
    wait_until(lambda: any(parent_of(pid) == raylet for pid in processes_of("ray::RingActor.call")), deadline)
    cluster.remove_node(node, allow_graceful=False)


def wait_until(true: Callable[[], bool], deadline: float) -> None:
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)


def processes_of(title: str) -> list[int]:
    return [pid for pid, words in processes() if words[0].startswith(title)]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return os.getpid()
