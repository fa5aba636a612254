"""What a job on Ray does first: find its cluster and its workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import ray_logging
from ray._private import worker as ray_worker

from raybsa import signals
from raybsa.cluster.resources import Share, alive_nodes, fitting
from raybsa.cluster.sockets import require_room
from raybsa.events import show
from raybsa.experiments.head_address import is_outside, require_an_answer, target_of


class NoCluster(ConnectionError):
    """Nothing answers at the address of a cluster, or it is no address."""


@contextmanager
def cluster(
    address: str | None,
    *,
    num_cpus: int | None = None,
    deaths: bool = True,
    verbose: bool = False,
    inside: bool = False,
) -> Iterator[None]:
    """A connection to the cluster at ``address`` (or RAY_ADDRESS, else one of our own), closed however the job ends.

    SIGTERM, which ``ray job stop`` sends, and SIGHUP end the job as Ctrl-C does: in order (``signals.py``).

    Args:
        num_cpus: what a cluster of our own may hand out; None is what the machine has.
        deaths: whether Ray may print a paragraph on each worker that dies; who kills them on purpose has no use for it.
        verbose: print the events of this process, and what the workers print, all of it.
        inside: the driver must be a process of the cluster, which Ray Client's is not.

    Raises:
        NoCluster: no head answers at the address, or it is none.
    """
    target = target_of(address)
    _check(target, inside)
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
        raise NoCluster(f"a running Ray cluster was wanted at {target!r}: {' '.join(str(error).split())}") from error
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


def _check(target: str, inside: bool) -> None:
    """Says before Ray starts what it would say late, or not at all."""
    if not os.environ.get("RAY_ADDRESS", "set").strip():
        del os.environ["RAY_ADDRESS"]  # Ray would take it for an address
    if inside and is_outside(target):
        raise NoCluster(
            f"this job runs within the cluster, which {target!r} (Ray Client) does not: `ray job submit --address "
            "http://HOST:8265 --working-dir . -- python jobs/...`, or --address HOST:6379 on one of its machines"
        )
    if target == "local":
        return _check_sockets()
    try:
        require_an_answer(target)
    except ValueError as error:
        raise NoCluster(f"a running Ray cluster was wanted at {target!r}: {error}") from error
    except OSError as error:
        raise NoCluster(f"a running Ray cluster was wanted at {target!r}, nothing answers there: {error}") from error


def _check_sockets() -> None:
    try:
        require_room(get_default_ray_temp_dir(), os.getpid())
    except ValueError as error:
        raise NoCluster(str(error)) from error


def _has(node: dict[str, float], what: str) -> int:
    return int(node.get(what, 0))
