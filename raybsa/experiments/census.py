"""Census: what this driver and its Ray node hold at a moment, so that what a run leaves behind can be named."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass, fields
from pathlib import Path

import ray

from raybsa.cluster.nodes import processes, raylet_of

_LISTEN = "0A"


@dataclass(frozen=True)
class Census:
    """Names of what is there: member processes of this node, ports on which this process listens, its threads, its open
    sockets and files, files in shared memory, and files in the folder for temporary ones."""

    members: frozenset[str]
    ports: frozenset[str]
    threads: frozenset[str]
    descriptors: frozenset[str]
    shared_memory: frozenset[str]
    temporary: frozenset[str]

    @classmethod
    def take(cls) -> Census:
        raylet = raylet_of(ray.get_runtime_context().get_node_id())
        members = {str(pid) for pid, words in processes() if words[0].startswith("ray::Member") and _of(pid, raylet)}
        sockets = _targets("self")
        return cls(
            frozenset(members),
            frozenset(port for port, inode in _listening() if f"socket:[{inode}]" in sockets),
            frozenset(thread.name for thread in threading.enumerate()),
            frozenset(sockets),
            frozenset(_names(Path("/dev/shm"))),
            frozenset(_names(Path(tempfile.gettempdir()))),
        )

    def left_since(self, before: Census) -> dict[str, list[str]]:
        """What is here and was not before, by kind; nothing where all was given back. Of descriptors, which change all
        the time, only those beyond the number before count; shared memory that a living process holds is its own."""
        found = {field.name: sorted(getattr(self, field.name) - getattr(before, field.name)) for field in fields(self)}
        found["descriptors"] = found["descriptors"][: max(0, len(self.descriptors) - len(before.descriptors))]
        if found["shared_memory"]:
            held = {target for pid, _ in processes() for target in _targets(str(pid))}
            found["shared_memory"] = [name for name in found["shared_memory"] if f"/dev/shm/{name}" not in held]
        return {kind: names for kind, names in found.items() if names}


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _of(pid: int, parent: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1] == str(parent)
    except OSError:
        return False


def _targets(pid: str) -> set[str]:
    """What the open descriptors of a process lead to."""
    found = set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            found.add(os.readlink(link))
    except OSError:
        pass  # it ended, or a descriptor was closed meanwhile
    return found


def _listening() -> list[tuple[str, str]]:
    """(port, inode) of every TCP socket that listens."""
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()
    ]
    return [(str(int(row[1].rpartition(":")[2], 16)), row[9]) for row in rows if row[3] == _LISTEN]


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
