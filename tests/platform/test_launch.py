"""Finding a cluster and what it can hold: workers lie on one machine each, and a silent address is an error at once."""

import time

import pytest

from raybsa.cluster.resources import Share
from raybsa.experiments import launch


@pytest.fixture
def machines(monkeypatch):
    """Makes the connected cluster one of these machines."""

    def make(*resources, down=()):
        nodes = [{"Alive": True, "Resources": one} for one in resources]
        nodes += [{"Alive": False, "Resources": one} for one in down]
        monkeypatch.setattr(launch.ray, "nodes", lambda: nodes)

    return make


def test_the_default_worker_has_all_cpus_of_the_largest_machine_not_of_all_together(machines):
    machines({"CPU": 4.0}, {"CPU": 16.0}, {}, down=[{"CPU": 64.0}])
    assert launch.worker_share(None) == Share(16, 0)
    assert launch.worker_share(3) == Share(3, 0)
    assert launch.worker_share(3, 1) == Share(3, 1), "a cluster that grows where a GPU is asked for has none yet"


def test_where_there_are_gpus_a_worker_lies_beside_one(machines):
    machines({"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0})
    assert launch.worker_share(None) == Share(8, 1)
    assert launch.worker_share(None, 0) == Share(64, 0)


def test_a_cluster_without_cpus_is_asked_for_one(machines):
    machines({"memory": 1e9})
    assert launch.worker_share(None) == Share(1, 0)


@pytest.mark.parametrize(
    ("share", "resources", "room"),
    [
        (Share(3), [{"CPU": 4.0}] * 3, 3),
        (Share(1), [{"CPU": 2.0}, {"CPU": 1.0}, {}], 3),
        (Share(2, 1), [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 4.0}, {"CPU": 64.0}], 3),
        (Share(8), [{"CPU": 4.0}] * 4, 0),
        (Share(0.1), [{"CPU": 1.0}, {"CPU": 0.15}], 11),
        (Share(0.5, 1), [{"CPU": 1.0, "GPU": 8.0}], 2),
        (Share(1, 0.25), [{"CPU": 64.0, "GPU": 2.0}, {"CPU": 64.0}], 8),
    ],
)
def test_room_is_counted_machine_by_machine(machines, share, resources, room):
    machines(*resources)
    assert launch.room_for(share) == room


@pytest.mark.parametrize(("cpus", "threads"), [(0.25, 1), (1, 1), (3.0, 3)])
def test_a_share_has_a_thread_for_each_whole_cpu_and_one_for_a_fraction(machines, cpus, threads):
    machines({"CPU": 4.0})
    share = launch.worker_share(cpus)
    assert (share.num_threads, share.bundle) == (threads, {"CPU": float(cpus)})


@pytest.mark.parametrize("cpus", [0, -1, 1.5, 1e-4])
def test_a_share_of_no_cpu_or_of_one_and_a_half_is_refused(cpus):
    with pytest.raises(ValueError, match=r"whole CPUs or a fraction of one, from 0\.001, and at most one GPU, got "):
        Share(cpus)


@pytest.mark.parametrize("gpus", [-1, 1.5, 2])
def test_a_share_of_more_than_a_gpu_is_refused(gpus):
    with pytest.raises(ValueError, match=r"at most one GPU, got 1 CPU and "):
        Share(1, gpus)
    assert (Share(1, 0.5).bundle, Share(1, 0.5).device) == ({"CPU": 1.0, "GPU": 0.5}, "cuda")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:nine"])
def test_an_address_at_which_nothing_answers_is_an_error_at_once(address):
    start = time.monotonic()
    with pytest.raises(launch.NoCluster, match=f"wanted at '{address}', nothing answers there"):
        launch.cluster(address).__enter__()
    assert time.monotonic() - start < 20


def test_a_word_that_is_no_address_is_named():
    with pytest.raises(launch.NoCluster, match="wanted at 'nowhere': Invalid address format: nowhere"):
        launch.cluster("nowhere").__enter__()
