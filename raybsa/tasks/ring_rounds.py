"""How calls over ranks are timed: from a barrier to each rank's own end, all ranks the same calls in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from raybsa.comm import Communicator

STEPS = ("forward", "forward_backward", "single_forward", "single_forward_backward")
MEASURING = "timing"  # the ledger's word for what only the measurement sends
FEWEST = 3

Calls = Mapping[str, Callable[[], object]]


def rounds(calls: Calls, communicator: Communicator, repeats: int, budget_s: float) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; in those called ``single_*`` rank 0 is alone.

    Args:
        calls: by a step's name; only rank 0 has the single ones, or nobody.
        repeats: rounds; fewer, but at least 3, where the first says that they would take over ``budget_s`` seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    count, begin = 1, time.perf_counter()
    while len(times["forward"]) < count:
        for name in STEPS:
            if name in calls:
                times[name].append(timed(calls[name], communicator, together=not name.startswith("single")))
            communicator.barrier(MEASURING)
        if len(times["forward"]) == 1:
            slowest = max(from_all(time.perf_counter() - begin, communicator))
            count = max(FEWEST, min(repeats, int(budget_s / slowest)))
    return times


def timed(
    call: Callable[[], object],
    communicator: Communicator,
    together: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Milliseconds of one call by ``clock``, begun by all ranks at once where they call it ``together``."""
    if together:
        communicator.barrier(MEASURING)
    settle(communicator)
    begin = clock()
    call()
    settle(communicator)
    return (clock() - begin) * 1e3


def settle(communicator: Communicator) -> None:
    """Returns when this rank's device has done all that it was given."""
    if communicator.device.type == "cuda":
        communicator.settle()
        torch.cuda.synchronize(communicator.device)


def from_all(number: float, communicator: Communicator) -> list[float]:
    """Every rank's number, in rank order."""
    mine = torch.tensor([number], dtype=torch.float64, device=communicator.device)
    return [float(x) for x in communicator.all_gather(MEASURING, mine)]
