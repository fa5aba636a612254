"""What a worker owns of a cluster, and the bounded wait until the cluster has it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

_SAY_EVERY_S = 5.0

Say = Callable[[str], None]


class TooFewResources(RuntimeError):
    """The cluster did not give what was wanted in time; the message says what was wanted and what there is."""


@dataclass(frozen=True)
class Share:
    """What one worker owns: whole CPUs (its threads), and one GPU or none."""

    num_cpus: int = 1
    num_gpus: int = 0

    def __post_init__(self) -> None:
        if self.num_cpus < 1 or self.num_gpus not in (0, 1):
            raise ValueError(f"a worker owns at least one CPU and at most one GPU, got {self}")

    @property
    def bundle(self) -> dict[str, float]:
        """As a placement group asks for it."""
        return {"CPU": float(self.num_cpus)} | ({"GPU": 1.0} if self.num_gpus else {})

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
        wait_for([group.ready()], share, count, wait_s, say)
    finally:
        remove_placement_group(group)


def wait_for(references: list[Any], share: Share, count: int, wait_s: float, say: Say) -> None:
    """Waits until all ``references`` are there, telling every few seconds what is wanted and what there is.

    Raises:
        TooFewResources: they were not within ``wait_s`` seconds.
    """
    deadline = time.monotonic() + wait_s
    while True:
        left = max(0.0, deadline - time.monotonic())
        _, waiting = ray.wait(references, num_returns=len(references), timeout=min(_SAY_EVERY_S, left))
        if not waiting:
            return
        there, free = words(ray.cluster_resources()), words(ray.available_resources())
        wanted = f"{count} worker{'s' * (count > 1)} of {share} wanted, the cluster has {there} ({free} free)"
        left = deadline - time.monotonic()
        if left <= 0:
            raise TooFewResources(f"{wanted}; gave up after {wait_s:g} s")
        say(f"waiting up to {left:.0f} s: {wanted}")


def words(resources: Mapping[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU and {resources.get('GPU', 0):g} GPU"
