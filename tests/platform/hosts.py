"""Two hosts on one machine: network namespaces, a link between them that can be cut, and Ray on them. Needs root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest

FIRST, SECOND = "10.77.41.1", "10.77.41.2"
DOOR, OUTSIDE = "10.77.42.1", "10.77.42.2"


@dataclass(frozen=True)
class TwoHosts:
    """Names of the namespaces; the link is ``eth0`` in both."""

    first: str
    second: str

    def command(self, host: str, *words: str) -> list[str]:
        return ["ip", "netns", "exec", host, *words]

    def kill_all(self, host: str) -> None:
        """Ends every process on a host at once."""
        pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True).stdout
        for pid in pids.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> list[str]:
        """The command that cuts the link, from anywhere on the machine."""
        return ["ip", "-n", self.second, "link", "set", "eth0", "down"]

    def heal(self) -> list[str]:
        """The command that brings it back."""
        return ["ip", "-n", self.second, "link", "set", "eth0", "up"]


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Raises OSError where namespaces are not allowed."""
    hosts = TwoHosts(f"raybsa-a-{os.getpid()}", f"raybsa-b-{os.getpid()}")
    try:
        for name in (hosts.first, hosts.second):
            _ip("netns", "add", name)
        pair = ("type", "veth", "peer", "name", "eth0", "netns", hosts.second)
        _ip("link", "add", "eth0", "netns", hosts.first, *pair)
        for name, address in ((hosts.first, FIRST), (hosts.second, SECOND)):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", name, "link", "set", link, "up")
        yield hosts
    finally:
        for name in (hosts.first, hosts.second):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def outside(hosts: TwoHosts) -> Iterator[str]:
    """A third host, which reaches only the first, at ``DOOR``; its name."""
    name = f"raybsa-o-{os.getpid()}"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", "eth1", "netns", hosts.first, "type", "veth", "peer", "name", "eth0", "netns", name)
        for host, link, address in ((hosts.first, "eth1", DOOR), (name, "eth0", OUTSIDE)):
            _ip("-n", host, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", host, "link", "set", link, "up")
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def ray_node(hosts: TwoHosts, host: str, *options: str, **variables: str) -> Iterator[None]:
    """A Ray node on one of the hosts, from when it is up till all of its processes are gone."""
    words = hosts.command(host, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options)
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "eth0"} | variables
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


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
