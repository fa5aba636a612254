"""What a worker owns of a cluster, and the bounded wait until the cluster has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

_SAY_EVERY_S = 5.0
_SMALLEST = 1e-3  # of a CPU; Ray counts in ten-thousandths

Say = Callable[[str], None]


class TooFewResources(RuntimeError):
    """The cluster did not give what was wanted in time, or workers were too slow to start; the message says what was
    wanted, what there is, and which of the two it was."""


@dataclass(frozen=True)
class Share:
    """What one worker owns: whole CPUs, or a fraction of one that it shares with others; and a GPU, a share of one, or
    none."""

    num_cpus: float = 1
    num_gpus: float = 0

    def __post_init__(self) -> None:
        whole = self.num_cpus >= 1 and self.num_cpus == int(self.num_cpus)
        if not (whole or _SMALLEST <= self.num_cpus < 1) or not 0 <= self.num_gpus <= 1:
            raise ValueError(
                f"a worker owns whole CPUs or a fraction of one, from {_SMALLEST:g}, and at most one GPU, got {self}"
            )

    @property
    def num_threads(self) -> int:
        """CPU threads of PyTorch: one a whole CPU, one for a fraction."""
        return max(1, int(self.num_cpus))

    @property
    def bundle(self) -> dict[str, float]:
        """As a placement group asks for it."""
        return {"CPU": float(self.num_cpus)} | ({"GPU": float(self.num_gpus)} if self.num_gpus else {})

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"

    def __str__(self) -> str:
        return words({"CPU": self.num_cpus, "GPU": self.num_gpus})


def await_resources(share: Share, count: int, wait_s: float, say: Say = print) -> None:
    """Returns once the cluster can hold ``count`` shares at the same time.

    Raises:
        TooFewResources: it could not within ``wait_s`` seconds.
    """
    group = placement_group([share.bundle] * count)
    try:
        _wait_for([group.ready()], lambda waiting: wanted(share, count), wait_s, say)
    finally:
        remove_placement_group(group)


def await_workers(signs: Sequence[Any], share: Share, wait_s: float, say: Say) -> None:
    """Waits until every worker has given its sign, telling every few seconds what is wanted and what there is.

    Raises:
        TooFewResources: they had not within ``wait_s`` seconds; the message says whether they lacked resources or were
            still starting.
    """

    def state(waiting: int) -> str:
        why = why_not_up(share, len(signs), alive_nodes(), ray.available_resources())
        return f"{wanted(share, len(signs))}; {len(signs) - waiting} up, {waiting} not: {why}"

    _wait_for(signs, state, wait_s, say)


def why_not_up(share: Share, count: int, nodes: Sequence[Mapping[str, float]], free: Mapping[str, float]) -> str:
    """What some of ``count`` workers wait for, as far as the resources of the nodes and what is free in all tell.

    Ray gives a waiting worker its share as soon as one is free. So where one is free, or no more is taken than the
    workers' own shares, all have theirs and start: their processes import what they need, which takes a while.
    """
    if fitting(share, nodes) < count:
        return "the cluster is too small for all"
    taken = {what: sum(node.get(what, 0) for node in nodes) - free.get(what, 0) for what in share.bundle}
    one_free = all(free.get(what, 0) >= amount for what, amount in share.bundle.items())
    if one_free or all(abs(taken[what] - count * amount) < _SMALLEST for what, amount in share.bundle.items()):
        return "still starting"
    return "still starting, or waiting for what others hold"


def fitting(share: Share, nodes: Iterable[Mapping[str, float]]) -> int:
    """How many workers such nodes can hold at once: none of them lies on two machines."""
    return sum(min(int(node.get(what, 0) / amount + 1e-9) for what, amount in share.bundle.items()) for node in nodes)


def alive_nodes() -> list[dict[str, float]]:
    """The resources of each machine of the connected cluster that is up."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def wanted(share: Share, count: int) -> str:
    """What so many workers need, and what there is, in words."""
    there, free = words(ray.cluster_resources()), words(ray.available_resources())
    return f"{count} worker{'s' * (count > 1)} of {share} wanted, the cluster has {there} ({free} free)"


def _wait_for(references: Sequence[Any], state: Callable[[int], str], wait_s: float, say: Say) -> None:
    """Waits until all ``references`` are there; ``state`` says what is wanted and there when so many are not yet."""
    deadline = time.monotonic() + wait_s
    while True:
        left = max(0.0, deadline - time.monotonic())
        _, waiting = ray.wait(list(references), num_returns=len(references), timeout=min(_SAY_EVERY_S, left))
        if not waiting:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TooFewResources(f"{state(len(waiting))}; gave up after {wait_s:g} s")
        say(f"waiting up to {left:.0f} s: {state(len(waiting))}")


def words(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
