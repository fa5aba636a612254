"""Two hosts on one machine: network namespaces with a link between them that can be cut. Needs root."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

FIRST, SECOND = "10.77.41.1", "10.77.41.2"


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


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
