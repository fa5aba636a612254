"""Faults as data: what happens to which rank at which place of which step. Drills and tests inject them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from raybsa.comm import Phase


class FaultKind(StrEnum):
    """What happens to the fault's rank; those ``FROM_OUTSIDE`` are done to it while it waits for them.

    ``TWO_RANKS`` takes the next rank with it, ``SPARE`` a spare that would have stood in, ``LOST_NODE`` all that ran on
    the rank's node, and ``DRIVER`` the process of the coordinator.
    """

    EXIT = "exit"
    RAY_KILL = "ray_kill"
    SIGKILL = "sigkill"
    SIGSTOP = "sigstop"
    CUDA_ERROR = "cuda_error"
    OUT_OF_MEMORY = "out_of_memory"
    LOST_NODE = "lost_node"
    TWO_RANKS = "two_ranks"
    SPARE = "spare"
    DRIVER = "driver"


class FaultPlace(StrEnum):
    """Where in a step it happens."""

    BEFORE_FORWARD = "before_forward"
    FORWARD_HOP = "forward_hop"
    BACKWARD_HOP = "backward_hop"
    EXCHANGE = "exchange"
    BEFORE_COMMIT = "before_commit"
    CHECKPOINT = "checkpoint"
    RECOVERY = "recovery"


_PHASES = {
    FaultPlace.BEFORE_FORWARD: (Phase.STEP, "forward"),
    FaultPlace.FORWARD_HOP: (Phase.FORWARD, "attention"),
    FaultPlace.BACKWARD_HOP: (Phase.BACKWARD, "attention"),
    FaultPlace.EXCHANGE: (Phase.EXCHANGE, "gradient"),
    FaultPlace.BEFORE_COMMIT: (Phase.COMMIT, ""),
    FaultPlace.CHECKPOINT: (Phase.CHECKPOINT, ""),
    FaultPlace.RECOVERY: (Phase.RECOVERY, ""),
}
FROM_OUTSIDE = (FaultKind.RAY_KILL, FaultKind.LOST_NODE, FaultKind.TWO_RANKS, FaultKind.SPARE, FaultKind.DRIVER)


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        kind, place: what and where.
        rank: whose.
        step: in which step (for ``RECOVERY``: the step that the ring stands at; any where -1).
        hop: the ring's shift, for the two hop places.
    """

    kind: FaultKind
    place: FaultPlace
    rank: int
    step: int
    hop: int = 0

    def __str__(self) -> str:
        hop = f" {self.hop}" if self.place in (FaultPlace.FORWARD_HOP, FaultPlace.BACKWARD_HOP) else ""
        return f"{self.kind} at {self.place}{hop}, rank {self.rank}, step {self.step}"


# The k-th entry is armed in the k-th generation, so a step that is made again does not meet its fault again.
FaultPlan = Sequence[tuple[Fault, ...]]


class FaultInjector:
    """An observer of one rank's communicator that makes the armed faults happen.

    Args:
        faults: those of this generation.
        rank: this rank.
        step: tells the running step.
        marks: a folder for ``fired`` marks: a file per fault that holds the time (``time.time``) at which it struck.
        asks: called with a fault that must be done from outside; the rank then waits for it.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        rank: int,
        step: Callable[[], int],
        marks: str | None,
        asks: Callable[[Fault], None],
    ) -> None:
        self._mine = [fault for fault in faults if fault.rank == rank]
        self._step, self._marks, self._asks = step, marks, asks

    def begin(self, phase: Phase, kind: str, hop: int) -> None:
        for fault in self._mine:
            here = _PHASES[fault.place] == (phase, kind) and fault.step in (self._step(), -1)
            if here and (fault.place not in (FaultPlace.FORWARD_HOP, FaultPlace.BACKWARD_HOP) or fault.hop == hop):
                self._mine.remove(fault)
                self._strike(fault)
                return

    def end(self, phase: Phase, kind: str, hop: int) -> None: ...

    def _strike(self, fault: Fault) -> None:
        mark(self._marks, fault)
        if fault.kind in FROM_OUTSIDE:
            self._asks(fault)
            while True:
                time.sleep(0.1)
        _STRIKES[fault.kind]()


def mark_file(folder: str, fault: Fault) -> Path:
    """Where a fault that struck leaves its time."""
    return Path(folder) / f"{fault.kind}-{fault.place}-{fault.rank}-{fault.step}-{fault.hop}"


def mark(folder: str | None, fault: Fault) -> None:
    """Leaves the present time as that at which the fault struck."""
    if folder is not None:
        mark_file(folder, fault).write_text(repr(time.time()))


def _exit() -> None:
    os._exit(1)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _cuda_error() -> None:
    """A true device-side assertion on a GPU; nothing else leaves a process in that state."""
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA error can only be injected on a GPU")
    torch.zeros(1, device="cuda")[torch.ones(1, dtype=torch.int64, device="cuda")].item()


def _out_of_memory() -> None:
    """Asks for more than there is."""
    if torch.cuda.is_available():
        torch.empty(2**62, dtype=torch.uint8, device="cuda")
    raise MemoryError("injected: out of memory")


_STRIKES: dict[FaultKind, Callable[[], None]] = {
    FaultKind.EXIT: _exit,
    FaultKind.SIGKILL: _kill,
    FaultKind.SIGSTOP: _stop,
    FaultKind.CUDA_ERROR: _cuda_error,
    FaultKind.OUT_OF_MEMORY: _out_of_memory,
}
