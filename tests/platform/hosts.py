"""A third host beside ``raybsa.experiments.hosts``, and Ray on any of them. Needs root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from raybsa.experiments.hosts import LINK, TwoHosts, run_words

DOOR, OUTSIDE = "10.77.42.1", "10.77.42.2"


@contextmanager
def outside(hosts: TwoHosts) -> Iterator[str]:
    """A third host, which reaches only the first, at ``DOOR``; its name."""
    name = f"raybsa-o-{os.getpid()}"
    try:
        run_words("ip", "netns", "add", name)
        pair = ("type", "veth", "peer", "name", LINK, "netns", name)
        run_words("ip", "link", "add", "eth1", "netns", hosts.first, *pair)
        for host, link, address in ((hosts.first, "eth1", DOOR), (name, LINK, OUTSIDE)):
            run_words("ip", "-n", host, "addr", "add", f"{address}/24", "dev", link)
            run_words("ip", "-n", host, "link", "set", link, "up")
        yield name
    finally:
        with suppress(OSError):
            run_words("ip", "netns", "del", name)


@contextmanager
def ray_node(hosts: TwoHosts, host: str, *options: str, **variables: str) -> Iterator[None]:
    """A Ray node on one of the hosts, from when it is up till all of its processes are gone."""
    words = hosts.command(host, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options)
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": LINK} | variables
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail(f"the node on {host} did not start: {''.join(said)}")
        yield
    finally:
        hosts.kill_all(host)  # a node that cannot reach the others takes its time to end
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
