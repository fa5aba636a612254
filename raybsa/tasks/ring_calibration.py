"""What a ring's host does without a ring: messages of known size, and a kernel that all ranks run at once."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.kernels.api import block_sparse_attention
from raybsa.spec import TrialSpec
from raybsa.tasks.ring_contender import ring_layout
from raybsa.tasks.ring_rounds import MEASURING, from_all, timed
from raybsa.tasks.speed import synthetic_qkv
from raybsa.timing import forward_call, quantiles_of

_WARMUP = 3
_CROWDING_MS = 100.0


def measure_link(communicator: Communicator, *, repeats: int = 9) -> list[tuple[int, float]]:
    """(bytes, milliseconds) of messages to the next rank while one comes from the rank before, medians."""
    if communicator.world_size == 1:
        return []
    rank, world = communicator.rank, communicator.world_size
    largest = 28 if communicator.device.type == "cuda" else 22
    found = []
    for exponent in range(12, largest + 1, 2):
        sent = torch.zeros(1 << exponent, dtype=torch.uint8, device=communicator.device)
        received, times = torch.empty_like(sent), []

        def call(sent: Tensor = sent, received: Tensor = received) -> None:
            peers = {(rank + 1) % world: sent}, {(rank - 1) % world: received}
            communicator.exchange(MEASURING, *peers).wait()

        for _ in range(_WARMUP + repeats):
            times.append(timed(call, communicator))
        found.append((1 << exponent, quantiles_of(times[_WARMUP:]).p50))
    return found


def measure_crowding(spec: TrialSpec, communicator: Communicator, devices: int, *, repeats: int = 5) -> float:
    """How many times slower the kernel is where all ranks run it at once than where rank 0 does alone; no ring.

    One measurement is as many calls as take rank 0 some 100 ms, so that the ranks' calls do meet; the slowest rank
    counts. On the CPU it is processor time, which the host's other processes and a scheduler that leaves two ranks on
    one core do not change, and ranks beyond ``devices`` take turns.

    Args:
        devices: how many ranks compute at once: cores or GPUs.
    """
    layout, backend = ring_layout(spec, communicator.device), spec.layer(0).backend
    inputs = synthetic_qkv(spec, communicator.device)
    clock = time.perf_counter if communicator.device.type == "cuda" else time.thread_time

    def single(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return block_sparse_attention(q, k, v, layout, backend=backend)

    once = forward_call(single, inputs)
    once_ms = [timed(once, communicator, clock=clock) for _ in range(_WARMUP)][-1]
    calls = calls_within(_CROWDING_MS, from_all(once_ms, communicator)[0])

    def call() -> None:
        for _ in range(calls):
            once()

    alone, together = [], []
    for _ in range(repeats):
        if communicator.rank == 0:
            alone.append(timed(call, communicator, together=False, clock=clock))
        communicator.barrier(MEASURING)
        together.append(max(from_all(timed(call, communicator, clock=clock), communicator)))
    pace = quantiles_of(together).p50 / quantiles_of(alone).p50 if communicator.rank == 0 else 1.0
    return pace * max(1.0, communicator.world_size / devices)


def calls_within(limit_ms: float, call_ms: float) -> int:
    """How many calls of ``call_ms`` take at least ``limit_ms``."""
    return max(1, math.ceil(limit_ms / call_ms))
