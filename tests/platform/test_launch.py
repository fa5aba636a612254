"""Finding a cluster and what it can hold: workers lie on one machine each, and a silent address is an error at once."""

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from raybsa.cluster.resources import Share
from raybsa.cluster.sockets import require_room
from raybsa.experiments import launch
from raybsa.experiments.head_address import target_of


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


@pytest.fixture(params=[("127.0.0.1", socket.AF_INET), ("[::1]", socket.AF_INET6)], ids=["IPv4", "IPv6"])
def web_server(request):
    """HOST:PORT of a server that is no Ray head: a dashboard, say."""
    host, family = request.param
    kind = type("Server", (HTTPServer,), {"address_family": family})
    try:
        server = kind((host.strip("[]"), 0), BaseHTTPRequestHandler)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"{host}:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def nothing_starts(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(launch.ray, "init", lambda *_, **__: pytest.fail("nothing should have started"))


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:nine", "127.0.0.1:99999", ":1", "::1:6379", "ray://host"]
)
def test_an_address_at_which_nothing_answers_is_an_error_at_once(address):
    start = time.monotonic()
    with pytest.raises(launch.NoCluster, match=f"wanted at '{address}', nothing answers there"):
        launch.cluster(address).__enter__()
    assert time.monotonic() - start < 20


def test_a_word_that_is_no_address_is_named():
    with pytest.raises(launch.NoCluster, match="wanted at 'nowhere': Invalid address format: nowhere"):
        launch.cluster("nowhere").__enter__()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_what_answers_and_is_no_head_is_told_at_once(web_server, nothing_starts, scheme, capfd):
    with pytest.raises(launch.NoCluster, match=r"something else .port 8265 is the dashboard's.; wanted is .*HOST:"):
        launch.cluster(f"{scheme}{web_server}").__enter__()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "that is the job server's, for `ray job submit --address`; wanted is HOST:PORT"),
        ("https://cluster.example", "that is the job server's"),
        ("redis://127.0.0.1:6379", "there are no clusters of redis://; wanted is HOST:PORT"),
        ("::1:6379", r"an IPv6 address stands in brackets, as in \[::1\]:6379"),
        ("ray://host", "wanted is ray://HOST:10001"),
    ],
)
def test_an_address_of_another_form_is_told_with_the_form_that_is_wanted(nothing_starts, monkeypatch, address, message):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(launch.NoCluster, match=message):
        launch.cluster(None).__enter__()


def test_a_job_that_must_run_within_the_cluster_refuses_ray_client(nothing_starts):
    with pytest.raises(launch.NoCluster, match=r"'ray://127.0.0.1:10001' .Ray Client. does not: `ray job submit"):
        launch.cluster("ray://127.0.0.1:10001", inside=True).__enter__()


def test_an_empty_address_is_none(monkeypatch):
    for empty in ("", "  "):
        monkeypatch.setenv("RAY_ADDRESS", empty)
        assert [target_of(address) for address in (None, "", "host:1", "auto")] == ["local", "local", "host:1", "auto"]
    monkeypatch.setenv("RAY_ADDRESS", " head:6379 ")
    assert [target_of(address) for address in (None, "host:1", "auto")] == ["head:6379", "host:1", "head:6379"]


def test_a_folder_too_long_for_sockets_is_told_with_what_helps(nothing_starts, monkeypatch, tmp_path):
    folder = str(tmp_path / "job.1234567" / ("x" * 60))
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with pytest.raises(launch.NoCluster, match=f"sockets under {folder}/ray, .* may have 107: export RAY_TMPDIR=/tmp"):
        launch.cluster(None).__enter__()


def test_as_long_a_folder_as_ray_can_use_is_taken():
    """Ray's own check is the reference."""
    from ray._private.utils import validate_socket_filepath

    for length in range(20, 60):
        folder, pid = "/" + "é" * (length // 2), os.getpid()
        socket_path = f"{folder}/session_2026-12-01_23-59-59_999999_{pid}/sockets/plasma_store"
        try:
            validate_socket_filepath(socket_path)
        except OSError:
            with pytest.raises(ValueError, match="RAY_TMPDIR"):
                require_room(folder, pid)
        else:
            require_room(folder, pid)
