"""A whole host or node is lost: its link is cut, or its raylet is killed. The others go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from raybsa.cluster.faults import Fault, FaultKind, FaultPlace, mark_file
from raybsa.cluster.member import MemberSettings
from raybsa.cluster.nodes import kill_raylet
from raybsa.cluster.resources import Share
from raybsa.cluster.training import TrainingCoordinator
from raybsa.experiments.hosts import FIRST, SECOND, TwoHosts, two_hosts
from tests.platform.hosts import ray_node
from tests.platform.test_training import in_peace, spec

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
MEMORY = 100 << 20
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def text(tmp_path: Path) -> str:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "text.txt").write_bytes(bytes(range(32, 127)) * 60)
    return str(folder)


@pytest.fixture
def nodes(no_ray: None) -> Iterator[None]:
    """The driver's node, which offers nothing, and three nodes of one CPU. A node that is lost is missed soon."""
    soon = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    lean = {"object_store_memory": MEMORY, "include_log_monitor": False}
    head = {"num_cpus": 0, "include_dashboard": False, "no_monitor": True, "_system_config": soon} | lean
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=1, wait=False, **lean)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_spare_on_another_node_stands_in_for_the_rank_of_a_node_that_is_lost(
    nodes: None, text: str, tmp_path: Path
) -> None:
    plan = ((Fault(FaultKind.LOST_NODE, FaultPlace.EXCHANGE, 1, 5),),)
    with TrainingCoordinator(
        spec(text),
        Share(1),
        world_size=2,
        spares=1,
        settings=MemberSettings(marks=str(tmp_path)),
        plan=plan,
        wait_s=120.0,
        say=lambda text: None,
    ) as coordinator:
        result = coordinator.run(stretch=4, evaluate=False)
    assert mark_file(str(tmp_path), plan[0][0]).exists()
    assert [(recovery.filled, recovery.steps_lost) for recovery in result.recoveries] == [("spare", 0)]
    assert result.digest == in_peace(spec(text), 2).digest
    assert sum(node["Alive"] for node in ray.nodes()) <= 4
    own = ray.get_runtime_context().get_node_id()
    with pytest.raises(ValueError, match="the node to lose is the one that this driver hangs on"):
        kill_raylet(own)


def test_when_the_link_to_a_host_is_cut_the_others_go_on_within_seconds(text: str, tmp_path: Path) -> None:
    try:
        with two_hosts() as hosts:
            told = _train_and_cut(hosts, text)
    except OSError as error:
        pytest.skip(f"network namespaces are not allowed here: {error}")
    (recovery,) = told["recoveries"]
    assert (recovery["world_size"], recovery["steps_lost"]) == (2, 0)
    assert recovery["why"] == ["no sign of life for 2 s"]
    assert told["relative_error"] <= 1e-6
    print(
        f"noticed {recovery['noticed_in_s']:.1f} s after the cut, trained again after {recovery['resumed_at_s']:.1f} s"
    )


def _train_and_cut(hosts: TwoHosts, text: str) -> dict:
    common = ["--object-store-memory", str(MEMORY), "--disable-usage-stats", "--include-log-monitor", "false"]
    common += ["--num-cpus"]
    head = ["--head", "--port", "6399", "--node-ip-address", FIRST, "--include-dashboard", "false", "--no-monitor"]
    head += [*common, "2"]
    second = ["--address", f"{FIRST}:6399", "--node-ip-address", SECOND, *common, "1"]
    program = str(Path(__file__).parent / "lost_host_program.py")
    mode = {"RAY_AUTH_MODE": "disabled"}
    with ray_node(hosts, hosts.first, *head, **mode), ray_node(hosts, hosts.second, *second, **mode):
        command = hosts.command(hosts.first, sys.executable, program, text, *hosts.cut())
        environment = os.environ | ENVIRONMENT
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
