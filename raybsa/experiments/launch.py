"""What a job on Ray does first: find its cluster and its workers."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import ray
from ray._private import ray_logging
from ray._private import worker as ray_worker

from raybsa import signals
from raybsa.cluster.resources import Share, alive_nodes, fitting
from raybsa.events import show

_ANSWER_SECONDS = 10.0


class NoCluster(ConnectionError):
    """Nothing answers at the address of a cluster, or it is no address."""


@contextmanager
def cluster(
    address: str | None, *, num_cpus: int | None = None, deaths: bool = True, verbose: bool = False
) -> Iterator[None]:
    """A connection to the cluster at ``address`` (or RAY_ADDRESS, else one of our own), closed however the job ends.

    SIGTERM, which ``ray job stop`` sends, and SIGHUP end the job as Ctrl-C does: in order (``signals.py``).

    Args:
        num_cpus: what a cluster of our own may hand out; None is what the machine has.
        deaths: whether Ray may print a paragraph on each worker that dies; who kills them on purpose has no use for it.
        verbose: print the events of this process, and what the workers print, all of it.

    Raises:
        NoCluster: nothing answers at the address, or it is none.
    """
    target = address or os.environ.get("RAY_ADDRESS", "local")
    _require_an_answer(target)
    if verbose:
        show()
        ray_logging.RAY_DEDUP_LOGS = False  # two ranks' lines of one step would count as the same
    try:
        with signals.not_for_children():
            ray.init(
                address=target,
                num_cpus=num_cpus if target == "local" else None,
                include_dashboard=False if target == "local" else None,
                log_to_driver=verbose,
                logging_level=logging.ERROR,
                namespace="raybsa",
            )
    except (ConnectionError, ValueError) as error:
        raise NoCluster(f"a running Ray cluster was wanted at {target!r}: {error}") from error
    signals.listen()  # again: Ray has a handler of its own
    with nullcontext() if deaths else without_rays_messages():  # Ray prints what it has kept when it shuts down
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def without_rays_messages() -> Iterator[None]:
    """What the raylet reports to this driver is not printed meanwhile. ``log_to_driver=False`` is only about what
    workers print; for the reports Ray has this switch alone, which its own debugger uses."""
    before, ray_worker._worker_logs_enabled = ray_worker._worker_logs_enabled, False
    try:
        yield
    finally:
        ray_worker._worker_logs_enabled = before


def worker_share(cpus: float | None, gpus: float | None = None) -> Share:
    """What a worker owns.

    Args:
        cpus: whole ones or a fraction of one; None: all CPUs of the largest machine to be had.
        gpus: one, a share of one or none; None: one where the connected cluster has any now. A cluster that starts its
            GPU machines when someone asks for a GPU must be asked.
    """
    if gpus is None:
        gpus = 1 if any(_has(node, "GPU") for node in alive_nodes()) else 0
    if cpus is None:
        cpus = max([1, *(_has(node, "CPU") for node in alive_nodes() if _has(node, "GPU") >= gpus)])
    return Share(cpus, gpus)


def room_for(share: Share) -> int:
    """How many workers the connected cluster can hold at once: none of them lies on two machines."""
    return fitting(share, alive_nodes())


def _require_an_answer(target: str) -> None:
    """Ray itself would wait for many minutes, without a word."""
    host, colon, port = target.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not colon:
        return  # "local" and "auto" are no addresses
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise NoCluster(f"a running Ray cluster was wanted at {target!r}, nothing answers there: {error}") from error


def _has(node: dict[str, float], what: str) -> int:
    return int(node.get(what, 0))
