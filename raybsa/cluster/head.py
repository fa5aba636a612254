"""A Ray head of our own on this machine, on free ports and under a token, started and stopped by its pid."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from raybsa.cluster.sockets import require_room

START_SECONDS = 90
STOP_SECONDS = 45
_PREFIX = "raybsa-"  # of the folder of a head


@dataclass(frozen=True)
class LocalHead:
    """A running head: where jobs are submitted, and the environment that its clients need."""

    address: str
    environment: dict[str, str]


@contextmanager
def local_head(num_cpus: int) -> Iterator[LocalHead]:
    """A head for the ``with`` block, then all of its processes are gone.

    Its files lie in a temporary folder of their own, so that no other cluster of this machine is touched or found.
    Ray listens on all interfaces, so a token of its own, in ``environment``, keeps everyone else out.

    Args:
        num_cpus: CPU shares that the cluster offers.

    Raises:
        RuntimeError: the head did not answer within ``START_SECONDS``; the message ends with its last words.
    """
    token = secrets.token_hex(32)
    binaries = str(Path(sys.executable).parent)  # jobs run `python`: this one
    environment = os.environ | {
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_LOGGER_LEVEL": "warning",
        "no_proxy": ",".join(filter(None, ("127.0.0.1", os.environ.get("no_proxy"), os.environ.get("NO_PROXY")))),
    }
    environment.pop("RAY_ADDRESS", None)
    port, client_port, dashboard_port, agent_port = _free_ports(4)
    options = {
        "num-cpus": num_cpus,
        "node-ip-address": "127.0.0.1",
        "port": port,
        "ray-client-server-port": client_port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard_port,
        "dashboard-agent-listen-port": agent_port,  # it runs the jobs; its default port may be another cluster's
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    parent = os.environ.get("RAY_TMPDIR") or None
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent, ignore_cleanup_errors=True) as folder:
        log = Path(folder, "head.log")
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, f"--temp-dir={folder}", *(f"--{name}={value}" for name, value in options.items())],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the caller, who then stops the head in order
            )
        try:
            address = f"http://127.0.0.1:{dashboard_port}"
            _wait_until_it_answers(process, f"{address}/api/version", token, log)
            _wait_until_it_answers(process, f"http://127.0.0.1:{agent_port}/api/local_raylet_healthz", token, log)
            yield LocalHead(address, environment)
        finally:
            _stop(process)


def require_room_for_a_head() -> None:
    """Raises ValueError where the paths of its sockets would be too long; the message says what helps."""
    require_room(os.path.join(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), f"{_PREFIX}12345678"))


def _free_ports(count: int) -> list[int]:
    with_sockets = [socket.socket() for _ in range(count)]
    try:
        for one in with_sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in with_sockets]
    finally:
        for one in with_sockets:
            one.close()


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, token: str, log: Path) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the network cannot see loopback
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with direct.open(request, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    last_words = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"a local Ray head should answer at {url} within {START_SECONDS} s, it said:\n{last_words}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM makes a blocking head end its own processes; what is left of its session then is killed."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
