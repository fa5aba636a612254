"""What every measuring job does first: find its results folder, its commit, its cluster and its workers."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from raybsa.cluster.resources import Share


def absolute(option: str, path: str) -> str:
    """The path from the root; a URI as it is.

    Raises:
        ValueError: a relative path in a submitted job, which runs in a temporary copy where the results would be lost.
    """
    if "://" in path or os.path.isabs(path):
        return path
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ValueError(f"{option} must be absolute in a submitted job (it runs in a temporary copy), got {path!r}")
    return os.path.abspath(path)


def git_commit(folder: Path) -> str:
    """The commit that ``folder`` is checked out at; empty without git or in an uploaded copy."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A connection to the cluster at ``address`` (or RAY_ADDRESS, else one of our own), closed however the job ends.

    SIGTERM, which ``ray job stop`` sends, ends the job as Ctrl-C does: in order.
    """
    target = address or os.environ.get("RAY_ADDRESS", "local")
    ray.init(
        address=target,
        include_dashboard=False if target == "local" else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace="raybsa",
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        ray.shutdown()


def worker_share(cpus: int) -> Share:
    """``cpus`` and one GPU where the connected cluster has any."""
    return Share(cpus, 1 if int(ray.cluster_resources().get("GPU", 0)) else 0)
