"""predict: seconds, bytes and memory of one step of the ring, from its Work and the Hardware.

The clock of every rank follows ``ring_attention``. Hop i computes for

    C[i] = slow · (call_s + (active[i] + row_blocks · rows[i]) · batch · heads · flop / rate)

where a pair of blocks is ``flop = 2 · products · q_block · kv_block · head_dim`` (2 products forward, 5 backward) and
``slow`` is how much ranks that share a host slow each other down (measured, else ``world_size / devices``). What
arrives takes ``latency + bytes / bandwidth`` once sender and receiver have started it and the link has carried what
came before. With ``end[0] = C[0]``,

    end[i] = max(end[i-1], arrival[i]) + C[i]        arrival[i] is under way from end[i-1-a] or the start

with ``a = hops_ahead(...)``, so hop 0 hides the first transfers. The backward walks the same hops again and returns
each hop's dK and dV, which are waited for ``a`` hops later. The step takes as long as its last rank. One rank is the
same formula with no hops.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from raybsa.ring.hardware import PRODUCTS, Hardware, Pass
from raybsa.ring.plan import hops_ahead
from raybsa.ring.work import Work


@dataclass(frozen=True)
class Sizes:
    """The tensors of one layer: q (batch, num_heads, S, head_dim), k and v with num_kv_heads."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int

    @property
    def sum_itemsize(self) -> int:
        """Bytes of the numbers that partial results and gradients are summed in (float32, or float64)."""
        return max(4, self.itemsize)


@dataclass(frozen=True)
class Prediction:
    """Of one layer's attention. Bytes on the wire are those of all ranks together.

    ``compute_s`` is what the busiest rank computes in forward and backward: the rest of ``forward_backward_s`` is
    waiting. ``memory_bytes`` is the fullest rank's, beyond q, k and v.
    """

    forward_s: float
    forward_backward_s: float
    compute_s: float
    forward_bytes: int
    forward_backward_bytes: int
    memory_bytes: int
    imbalance: float


def predict(work: Work, sizes: Sizes, hardware: Hardware) -> Prediction:
    """One step on ``work.world_size`` ranks of ``hardware``. O(hops × world_size) work."""
    block = 2 * sizes.batch * sizes.num_kv_heads * work.kv_block_size * sizes.head_dim  # K and V of one block, numbers
    forward, backward = (compute_seconds(work, sizes, hardware, direction) for direction in Pass)
    carried = _transfer_seconds(work, hardware, work.received, block * sizes.itemsize, 1)
    returned = _transfer_seconds(work, hardware, work.sent, block * sizes.sum_itemsize, -1)
    ahead = hops_ahead(round(float(work.received.max()) * block * sizes.itemsize))
    forward_s = _last_clock(work.shifts, ahead, forward, carried, None)
    blocks = float(work.received.sum()) * block
    return Prediction(
        forward_s,
        forward_s + _last_clock(work.shifts, ahead, backward, carried, returned),
        float((forward + backward).sum(0).max()),
        round(blocks * sizes.itemsize),
        round(blocks * (2 * sizes.itemsize + sizes.sum_itemsize)),
        round(_memory(work, sizes, block, ahead) + hardware.workspace_bytes),
        work.imbalance,
    )


def compute_seconds(work: Work, sizes: Sizes, hardware: Hardware, direction: Pass) -> np.ndarray:
    """(hops, world_size) seconds of every hop's kernel; a hop without rows is not called."""
    kernel = hardware.kernel(direction, work.q_block_size)
    blocks = work.active + kernel.row_blocks * work.rows
    called = np.minimum(work.rows, 1)  # an estimate's expected rows may be a fraction of one
    return hardware.slow(work.world_size) * (
        called * kernel.call_s + blocks * pair_flop(work, sizes, direction) / kernel.rate
    )


def pair_flop(work: Work, sizes: Sizes, direction: Pass) -> float:
    """FLOP of one active pair of blocks in every head and sample."""
    tile = work.q_block_size * work.kv_block_size * sizes.head_dim
    return 2.0 * PRODUCTS[direction] * tile * sizes.batch * sizes.num_heads


def _transfer_seconds(work: Work, hardware: Hardware, blocks: np.ndarray, nbytes: int, sign: int) -> np.ndarray:
    """(hops, world_size) seconds until blocks of ``nbytes`` from ``rank - sign · shift`` are there, the link free; a
    negative number where none come."""
    ranks = np.arange(work.world_size)
    near, far = hardware.link, hardware.far_link or hardware.link
    node = ranks // (hardware.node_size or work.world_size)
    outside = node[(ranks - sign * work.shifts[:, None]) % len(ranks)] != node
    latency = np.where(outside, far.latency_s, near.latency_s)
    rate = np.where(outside, far.bytes_per_s, near.bytes_per_s)
    return np.where(blocks > 0, np.minimum(blocks, 1) * latency + blocks * nbytes / rate, -1.0)


def _last_clock(
    shifts: np.ndarray, ahead: int, compute: np.ndarray, carried: np.ndarray, returned: np.ndarray | None
) -> float:
    """When the last rank has computed its last hop, and has its gradients back where some are ``returned``."""
    links, hops = _Links(compute.shape[1]), len(shifts)
    clock = compute[0]
    coming = deque(links.exchange(np.zeros_like(clock), carried[i], shifts[i]) for i in range(1, min(hops, 1 + ahead)))
    back: deque[np.ndarray] = deque()
    for i in range(1, hops):
        arrived, later = coming.popleft(), i + ahead
        if later < hops:
            coming.append(links.exchange(clock, carried[later], shifts[later]))
        clock = np.maximum(clock, arrived) + compute[i]
        if returned is not None:
            back.append(links.exchange(clock, returned[i], -shifts[i]))
            if len(back) > ahead:
                clock = np.maximum(clock, back.popleft())
    return float(np.maximum.reduce([clock, *back]).max())


class _Links:
    """One link a rank, which carries one exchange after another; sending and receiving overlap."""

    def __init__(self, world_size: int) -> None:
        self._ranks, self._free = np.arange(world_size), np.zeros(world_size)

    def exchange(self, started: np.ndarray, seconds: np.ndarray, shift: int) -> np.ndarray:
        """(world_size,) when each rank has received from ``rank - shift`` and sent to ``rank + shift``."""
        world, ready = len(self._ranks), np.maximum(started, self._free)
        source, target = (self._ranks - shift) % world, (self._ranks + shift) % world
        arrived = np.where(seconds >= 0, np.maximum(ready, ready[source]) + seconds, 0.0)
        done = np.maximum(arrived, arrived[target])
        self._free = np.maximum(self._free, done)
        return done


def _memory(work: Work, sizes: Sizes, block: int, ahead: int) -> float:
    """Bytes of the fullest rank in forward and backward, beyond q, k, v and the kernel's workspace: out, its gradient,
    lse and delta, dQ, dK and dV as sums (which the first hop's part becomes), a later hop's part of dQ, and the buffers
    of the hops under way with room for one unpacked.
    """
    tokens = work.owned * work.q_block_size
    wide = sizes.num_heads * sizes.head_dim
    all_wide = wide + 2 * sizes.num_kv_heads * sizes.head_dim
    held = tokens * sizes.batch * (2 * wide * sizes.itemsize + 2 * sizes.num_heads * sizes.sum_itemsize)
    sums = tokens * sizes.batch * all_wide * sizes.sum_itemsize
    part = tokens * sizes.batch * wide * sizes.sum_itemsize * (work.world_size > 1)
    hop = work.received.max(0) * block
    under_way = 2 + min(ahead, len(work.shifts))
    buffers = under_way * hop * (sizes.itemsize + sizes.sum_itemsize)
    return float((held + sums + part + buffers).max())
