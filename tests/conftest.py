"""Shared by all tests: one seed, one thread, one Ray cluster, one place that says which devices a test runs on."""

import os
import time
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small tensors, and threads that wait for others spin
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on the CPU


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

    ray.init(
        address="local", num_cpus=6, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture
def everything_is_given_back(ray_cluster: str) -> Iterator[None]:
    """After the test the whole cluster is free again: no worker outlived its coordinator."""
    import ray

    yield
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < 6:
        assert time.monotonic() < deadline, f"6 CPUs should be free again, there are {ray.available_resources()}"
        time.sleep(0.1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several workers (``make test``) a file stays on one, and so do all that use the one Ray cluster: these
    come first, since they take longest and mostly wait."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    items.sort(key=lambda item: not _uses_the_cluster(item))
    for item in items:
        group = "cluster" if _uses_the_cluster(item) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


def _uses_the_cluster(item: pytest.Item) -> bool:
    return "ray_cluster" in getattr(item, "fixturenames", ())
