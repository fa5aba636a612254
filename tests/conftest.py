"""Shared by all tests: one seed, one thread, one Ray cluster, one place that says which devices a test runs on."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small tensors, and threads that wait for others spin
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: a lost peer is a page of C++ frames
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on the CPU

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background: children would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """The address of a local Ray cluster of 6 CPU shares, started once for all tests that need none of their own."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 6, "num_gpus": 0, "include_dashboard": False, "no_monitor": True}  # no one scales it
    cluster = Cluster(initialize_head=True, head_node_args=head)
    _connect(cluster.address)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def no_ray() -> Iterator[None]:
    """For a test with a cluster of its own: this process leaves the shared one, and comes back to it afterwards."""
    import ray

    address = ray.get_runtime_context().gcs_address if ray.is_initialized() else None
    ray.shutdown()
    yield
    ray.shutdown()
    if address:
        _connect(address)


def _connect(address: str) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")


@pytest.fixture
def everything_is_given_back(ray_cluster: str) -> Iterator[None]:
    """After the test the whole cluster is free again: no worker outlived its coordinator."""
    import ray

    yield
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 6:
        assert time.monotonic() < deadline, f"6 CPUs should be free again, there are {ray.available_resources()}"
        time.sleep(0.1)


# ---- several workers: make test -------------------------------------------------------------------------------------

SHARING_A_CLUSTER = (
    "tests/jobs/test_benchmark.py",
    "tests/jobs/test_training_jobs.py",
    "tests/platform/test_cluster.py",
    "tests/platform/test_rings.py",
    "tests/platform/test_training.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile`` one worker takes all that share a cluster, as one takes a file whose fixtures it made.

    (``--dist loadgroup`` is for this, but sees no group under pytest 9.2: pytest-xdist#1386.)
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class FilesAndACluster(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "cluster" if file in SHARING_A_CLUSTER else file

    return FilesAndACluster(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A worker begins with those that share a cluster: they take longest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith(SHARING_A_CLUSTER))
