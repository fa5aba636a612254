"""Nodes of a Ray cluster as processes of this machine: how a drill loses one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import ray


def kill_raylet(node_id: str) -> None:
    """Kills the raylet of a node of this machine; its workers end with it.

    Raises:
        ValueError: no such node is up on this machine, or it is the caller's own.
    """
    if node_id == ray.get_runtime_context().get_node_id():
        raise ValueError("the node to lose is the one that this driver hangs on")
    os.kill(raylet_of(node_id), signal.SIGKILL)


def raylet_of(node_id: str) -> int:
    """The process of a node's raylet; raises ValueError where there is none on this machine."""
    sockets = {node["NodeID"]: node["RayletSocketName"] for node in ray.nodes() if node["Alive"]}
    if node_id not in sockets:
        raise ValueError(f"a node that is up was wanted, got {node_id}; there are {', '.join(sockets)}")
    found = [pid for pid, words in processes() if _is_raylet(words, sockets[node_id])]
    if not found:
        raise ValueError(f"node {node_id} has no raylet on this machine")
    return found[0]


def processes() -> Iterator[tuple[int, list[str]]]:
    """Every process of this machine with the words of its command line."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                yield int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")


def _is_raylet(words: list[str], socket_name: str) -> bool:
    return words[0].endswith("/raylet") and f"--raylet_socket_name={socket_name}" in words
