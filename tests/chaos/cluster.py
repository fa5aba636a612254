"""One Ray cluster for all scenarios; a file shifts its workers' time of day, and their processes can be struck."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray.cluster_utils import Cluster

CPUS = 3
_CLOCK = """
import os, time
_true, _file = time.time, os.environ["RAYBSA_CHAOS_CLOCK"]
def _time():
    try:
        with open(_file) as file:
            shift = float(file.read() or 0)
        if shift:
            open(_file + "-shifted", "w").close()
        return _true() + shift
    except (OSError, ValueError):
        return _true()
time.time = _time
"""


@dataclass(frozen=True)
class Playground:
    """Where scenarios run: the cluster's ``address``, and the file that shifts its workers' clocks."""

    address: str
    clock: Path

    def shift(self, seconds: float) -> None:
        """The workers' time of day jumps."""
        self.clock.write_text(str(seconds))

    @property
    def was_shifted(self) -> bool:
        """Whether any worker has looked at a clock that had jumped."""
        return Path(f"{self.clock}-shifted").exists()

    def workers(self, *names: str) -> list[int]:
        """The processes of this cluster's actors whose names contain one of these."""
        mark = f"RAYBSA_CHAOS_CLOCK={self.clock}".encode()
        return [
            pid for pid, line in _processes() if line.startswith(b"ray::") and _named(line, names) and _has(pid, mark)
        ]

    def strike(self, number: signal.Signals, *names: str) -> int | None:
        """Sends a signal to one of them, the newest; returns its process, None where there is none."""
        found = self.workers(*names)
        if not found:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(max(found), number)
        return max(found)


@contextlib.contextmanager
def playground(folder: Path) -> Iterator[Playground]:
    """A cluster whose workers read their clock from a file in ``folder``; gone in the end."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(_CLOCK)
    clock, before = folder / "clock", dict(os.environ)
    clock.write_text("0")
    os.environ["RAYBSA_CHAOS_CLOCK"] = str(clock)
    os.environ["PYTHONPATH"] = f"{folder / 'site'}{os.pathsep}{before.get('PYTHONPATH', '')}"
    head = {"num_cpus": CPUS, "num_gpus": 0, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"object_store_memory": 100 << 20})
    os.environ.clear()
    os.environ.update(before)
    try:
        yield Playground(cluster.address, clock)
    finally:
        cluster.shutdown()


def _processes() -> Iterator[tuple[int, bytes]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(folder.name), (folder / "cmdline").read_bytes()


def _named(line: bytes, names: tuple[str, ...]) -> bool:
    return any(name.encode() in line for name in names)


def _has(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
