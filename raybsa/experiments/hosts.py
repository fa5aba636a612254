"""Two hosts on one machine: network namespaces and a link between them, to be cut or made slow. Needs root on Linux."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

FIRST, SECOND = "10.77.41.1", "10.77.41.2"
LINK = "eth0"  # its name on both hosts


@dataclass(frozen=True)
class TwoHosts:
    """Names of the namespaces."""

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
        return ["ip", "-n", self.second, "link", "set", LINK, "down"]

    def heal(self) -> list[str]:
        """The command that brings it back."""
        return ["ip", "-n", self.second, "link", "set", LINK, "up"]

    def limit(self, megabits: int) -> None:
        """Lets no more than this through the link, per second and direction.

        Raises:
            OSError: ``tc`` is missing or cannot do it here.
        """
        burst = max(64_000, megabits * 125)  # bytes: a millisecond's
        for host in (self.first, self.second):
            bucket = ["tbf", "rate", f"{megabits}mbit", "burst", f"{burst}", "latency", "50ms"]
            run_words("tc", "-n", host, "qdisc", "replace", "dev", LINK, "root", *bucket)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Raises OSError where namespaces are not allowed."""
    hosts = TwoHosts(f"raybsa-a-{os.getpid()}", f"raybsa-b-{os.getpid()}")
    try:
        for name in (hosts.first, hosts.second):
            run_words("ip", "netns", "add", name)
        pair = ("type", "veth", "peer", "name", LINK, "netns", hosts.second)
        run_words("ip", "link", "add", LINK, "netns", hosts.first, *pair)
        for name, address in ((hosts.first, FIRST), (hosts.second, SECOND)):
            run_words("ip", "-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            for link in ("lo", LINK):
                run_words("ip", "-n", name, "link", "set", link, "up")
        yield hosts
    finally:
        for name in (hosts.first, hosts.second):
            with suppress(OSError):
                run_words("ip", "netns", "del", name)


def run_words(*words: str) -> None:
    """Runs a command; raises OSError with its last words where it fails or is missing."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
