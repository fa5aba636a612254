"""Soak: one run under many faults; afterwards nothing may be left, and the driver must not have grown."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from raybsa.cluster.member import MemberSettings
from raybsa.experiments.census import Census, resident_mib
from raybsa.experiments.drill import Survived, survived
from raybsa.experiments.drill_plan import EVERY, soak_plan
from raybsa.experiments.drill_ring import Ring
from raybsa.scratch import scratch

_GROWTH_MIB = 48.0  # what counts as flat: allocators keep some
_SETTLE_S = 30.0


@dataclass(frozen=True)
class Soaked:
    """What a soak led to: a row a fault, what was left behind by kind, the driver's memory (MiB) over the run, and
    seconds."""

    faults: tuple[Survived, ...]
    left: dict[str, list[str]]
    memory_mib: tuple[float, ...]
    seconds: float

    @property
    def growth_mib(self) -> float:
        """The median of the last quarter minus that of the second one: the first is the start's."""
        quarter = max(1, len(self.memory_mib) // 4)
        return statistics.median(self.memory_mib[-quarter:]) - statistics.median(self.memory_mib[quarter : 2 * quarter])

    @property
    def good(self) -> bool:
        return not self.left and self.growth_mib <= _GROWTH_MIB and all(fault.good for fault in self.faults)


def soak(ring: Ring, count: int, seed: int, tell: Callable[[int, int, float], None]) -> Soaked:
    """``count`` faults over one run, and a run in peace before it; ``tell`` hears (step, recoveries, MiB) as it goes.

    Needs a connected Ray cluster on this machine that was started ``with own_temporary_folder``.
    """
    plan, steps = soak_plan(count, ring.world_size, seed)
    with ring.coordinator(steps, MemberSettings()) as coordinator:
        wanted = coordinator.run(evaluate=False).digest
    before, begin, memory = _census_at_rest(), time.monotonic(), [resident_mib()]
    with scratch("soak") as folder:
        marks = os.path.join(folder, "marks")
        os.mkdir(marks)
        settings = MemberSettings(checkpoints=f"{folder}/checkpoints", checkpoint_every=EVERY, marks=marks)

        def hear(step: int, loss: float) -> None:
            memory.append(resident_mib())
            tell(step, len(coordinator.recoveries), memory[-1])

        with ring.coordinator(steps, settings, plan, tell=hear) as coordinator:
            result = coordinator.run(evaluate=False, stretch=EVERY)
        faults = tuple(survived(plan, settings, result.recoveries, result.digest == wanted))
    seconds = time.monotonic() - begin
    return Soaked(faults, _left(before), tuple(memory), seconds)


def _census_at_rest() -> Census:
    """A census when every worker has been given back, or as it is after a while."""
    deadline = time.monotonic() + _SETTLE_S
    while (census := Census.take()).members and time.monotonic() < deadline:
        time.sleep(0.2)
    return census


def _left(before: Census) -> dict[str, list[str]]:
    """What stays; processes and sockets take a moment to go."""
    deadline = time.monotonic() + _SETTLE_S
    while (left := Census.take().left_since(before)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """This process and those that it starts have a folder for temporary files of their own meanwhile."""
    before = os.environ.get("TMPDIR")
    with scratch("soak") as folder:
        os.environ["TMPDIR"], tempfile.tempdir = folder, None
        try:
            yield
        finally:
            tempfile.tempdir = None
            del os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before
