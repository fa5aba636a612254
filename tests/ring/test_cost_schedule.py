"""The clock of the cost formula is that of the real ring: ranks exchange real messages, and beside them carry clocks
that their kernels advance. No second is measured."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from raybsa import BlockLayout, patterns
from raybsa.comm import Communicator, Phase
from raybsa.ring import attention
from raybsa.ring import plan as plan_module
from raybsa.ring.attention import ring_attention
from raybsa.ring.cost import Sizes, pair_flop, predict
from raybsa.ring.hardware import Hardware, Kernel, Link, Pass
from raybsa.ring.partition import partition_for
from raybsa.ring.plan import RingPlan
from raybsa.ring.work import Work, work_of
from tests.ranks import run_ranks

SIZES = Sizes(1, 1, 1, 4, 4)
BUSIEST_S = {Pass.FORWARD: 1.0, Pass.BACKWARD: 2.0}  # what the busiest rank computes
OWN = threading.local()  # the clock of a rank's thread


class Clock:
    """A rank's clock, as an observer of its communicator. A transfer takes no time once both ranks have started it; a
    rank hears of transfers in the order in which it started them.

    Args:
        started: when (which transfer, rank) was started, of all ranks.
    """

    def __init__(self, plan: RingPlan, rank: int, started: dict[tuple[str, int, int], float]) -> None:
        self.now = 0.0
        self._rank, self._started = rank, started
        self._hops = {hop.shift: hop for hop in plan.of_rank(rank).hops}
        self._under_way: list[tuple[str, int]] = []

    def begin(self, phase: Phase, kind: str, hop: int) -> None:
        if phase == Phase.TRANSFER and kind.startswith("kv"):
            self._started[kind, hop, self._rank] = self.now
            self._under_way.append((kind, hop))

    def end(self, phase: Phase, kind: str, hop: int) -> None:
        if phase == Phase.TRANSFER:
            while (kind, hop) in self._under_way:
                self.now = max(self.now, self._met(*self._under_way.pop(0)))

    def _met(self, kind: str, shift: int) -> float:
        """When this rank and those it sends to and receives from had all started it."""
        hop = self._hops[shift]
        peers = [peer for peer, blocks in ((hop.target, hop.send), (hop.source, hop.receive)) if len(blocks)]
        return max(self._started[kind, shift, rank] for rank in (self._rank, *peers))


def timed(work: Work, monkeypatch: pytest.MonkeyPatch) -> Hardware:
    """Makes kernels advance their rank's clock by their number of active blocks, and returns such hardware."""
    most = float(work.active.sum(0).max())
    block_s = {way: seconds / most for way, seconds in BUSIEST_S.items()}

    def forward(call: Any, backend: str) -> Any:
        OWN.clock.now += block_s[Pass.FORWARD] * call.layout.nnz_blocks
        return torch.zeros_like(call.q), call.q.new_zeros(call.q.shape[:-1])

    def backward(call: Any, *others: Any) -> Any:
        OWN.clock.now += block_s[Pass.BACKWARD] * call.layout.nnz_blocks
        return torch.zeros_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v), None

    monkeypatch.setattr(attention, "run_call", forward)
    monkeypatch.setattr(attention, "attention_backward", backward)
    kernels = (Kernel(way, work.q_block_size, pair_flop(work, SIZES, way) / s) for way, s in block_s.items())
    return Hardware("clocks", tuple(kernels), Link(0.0, float("inf")))


def clocks(plan: RingPlan) -> tuple[float, float]:
    """Of the slowest rank, after the forward and after forward and backward, each begun by all ranks at once."""
    of_passes: tuple[dict, dict] = ({}, {})

    def step(communicator: Communicator) -> tuple[float, float]:
        tokens = plan.partition.lengths[communicator.rank]
        q, k, v = (torch.randn(1, 1, tokens, 4, requires_grad=True) for _ in range(3))
        OWN.clock = communicator.observer = first = Clock(plan, communicator.rank, of_passes[0])
        out = ring_attention(q, k, v, plan, communicator)
        OWN.clock = communicator.observer = second = Clock(plan, communicator.rank, of_passes[1])
        out.sum().backward()
        return first.now, second.now

    forward, backward = (max(column) for column in zip(*run_ranks(plan.world_size, step), strict=True))
    return forward, forward + backward


def cone(share: float) -> BlockLayout:
    """Each row keeps the first block and the nearest ones, a share of what it sees: the last rows have most work."""
    rows = [sorted({0, *range(i + 1 - max(1, round(share * (i + 1)) - 1), i + 1)}) for i in range(64)]
    return BlockLayout.from_rows(rows, q_len=16 * 64, kv_len=16 * 64, q_block_size=16, causal=True)


@pytest.mark.parametrize(
    ("family", "strategy", "in_flight", "waits"),
    [
        ("dense", "zigzag", plan_module.IN_FLIGHT_BYTES, False),
        ("sliding_window", "striped", plan_module.IN_FLIGHT_BYTES, False),
        ("sliding_window", "zigzag", plan_module.IN_FLIGHT_BYTES, False),
        ("sink_window", "zigzag", plan_module.IN_FLIGHT_BYTES, False),
        ("sliding_window", "contiguous", 0, False),
        ("sliding_window", "zigzag", 0, True),  # one hop ahead: who is busy in one hop holds up the others
        ("cone", "zigzag", 0, True),
    ],
)
def test_ranks_wait_for_each_other_as_predicted(
    family: str, strategy: str, in_flight: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "IN_FLIGHT_BYTES", in_flight)
    params = {"sink": 16} if family == "sink_window" else {}
    density = None if family == "dense" else 0.4
    if family == "cone":
        layout = cone(0.4)
    else:
        rule = patterns.build({"name": family, "params": params})
        layout = rule.layout(16 * 64, q_block_size=16, causal=True, density=density)
    plan = RingPlan(layout, partition_for([layout], 4, strategy=strategy))
    work = work_of(plan)
    told = predict(work, SIZES, timed(work, monkeypatch))
    assert (told.forward_backward_s > 1.2 * told.compute_s) is waits
    assert clocks(plan) == pytest.approx((told.forward_s, told.forward_backward_s), rel=1e-9)
