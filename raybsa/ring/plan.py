"""RingPlan: which KV blocks go from which rank to which, and what each rank computes when they arrive.

Rank r owns the blocks that the partition deals it. In hop h it receives from rank r - h and sends to rank r + h, so
every hop is a permutation. A block travels only to ranks with a query block that sees it, for the KV heads whose
queries do; a pair of ranks, or a whole hop, with nothing to send does not exist. Hop 0 is the rank's own blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from raybsa.layout import BlockLayout
from raybsa.ring.needs import away, needed_blocks, traffic
from raybsa.ring.partition import Partition, imbalance

IN_FLIGHT_BYTES = 256 * 2**20
PLANS_KEPT = 4  # of one layout


def hops_ahead(largest_buffer: int) -> int:
    """How many hops a rank starts before it needs them, at least one: as many as ``IN_FLIGHT_BYTES`` hold.

    A rank that computes long in one hop then does not keep others waiting for blocks that it has had all along. The
    same number on every rank, so that the messages of a pair keep one order.

    Args:
        largest_buffer: bytes of K and V that any rank receives in any hop.
    """
    return max(1, IN_FLIGHT_BYTES // max(1, largest_buffer))


@dataclass(frozen=True, eq=False)
class Hop:
    """What one rank does in one hop.

    Args:
        shift: h; 0 is the rank's own blocks.
        source, target: the ranks it receives from and sends to.
        send: (n,) int64 places ``kv_group * local blocks + block`` among its own blocks.
        receive: (m,) int64 places ``kv_group * len(kv_blocks) + block`` among the blocks at hand in this hop.
        kv_blocks: global ids of the KV blocks at hand in this hop.
        q_blocks: global ids of its query blocks that see one of them.
        layout: those query blocks against those KV blocks, with global positions.
        bias_index: (nnz,) the place of each of its blocks in the rank's own ``RankPlan.layout``.
        rows: (tokens,) places of the q_blocks' tokens among the rank's tokens; None where it is all of them.
    """

    shift: int
    source: int
    target: int
    send: Tensor
    receive: Tensor
    kv_blocks: Tensor
    q_blocks: Tensor
    layout: BlockLayout
    bias_index: Tensor
    rows: Tensor | None


@dataclass(frozen=True, eq=False)
class RankPlan:
    """One rank's part of the plan: the layout of its query blocks over all KV blocks, and its hops, own blocks first.

    All ranks list the same hops, so that every pair of ranks starts its transfers in one order; a rank that has nothing
    to send, to receive or to compute in one of them passes through.
    """

    rank: int
    layout: BlockLayout
    hops: tuple[Hop, ...]


class RingPlan:
    """The traffic and the work of a whole ring, known before anything runs. Pure data, the same on every rank.

    Args:
        layout: of the whole sequence, with 1, ``num_heads`` or ``batch * num_heads`` groups.
        partition: who owns which blocks.
        queries_per_kv: query heads that share a KV head (``H // Hkv``).

    Raises:
        ValueError: a layout of another length than the partition's, a selection, or groups that do not divide.
    """

    def __init__(self, layout: BlockLayout, partition: Partition, *, queries_per_kv: int = 1) -> None:
        _check(layout, partition, queries_per_kv)
        self.layout, self.partition, self.queries_per_kv = layout, partition, queries_per_kv
        self.world_size = partition.world_size
        self.kv_groups = max(1, layout.num_groups // queries_per_kv)
        self._ranks: dict[int, RankPlan] = {}

    # ---- who needs what --------------------------------------------------------------------------------------------

    @cached_property
    def q_owner(self) -> Tensor:
        """(num_q_blocks,) int64: the rank of each query block."""
        return self.partition.owner_of(self.layout.q_block_size)

    @cached_property
    def kv_owner(self) -> Tensor:
        """(num_kv_blocks,) int64: the rank of each KV block."""
        return self.partition.owner_of(self.layout.kv_block_size)

    @cached_property
    def needs(self) -> Tensor:
        """(world_size, kv_groups, num_kv_blocks) bool: the rank has a query that sees the block."""
        return needed_blocks(self.layout, self.q_owner, self.world_size, self.kv_groups)

    @cached_property
    def traffic(self) -> Tensor:
        """(world_size, world_size) int64: KV blocks that the row's rank receives from the column's, a block counted for
        each of the ``kv_groups`` that needs it; the diagonal is what stays at home."""
        return traffic(self.needs, self.kv_owner)

    @cached_property
    def active_blocks(self) -> Tensor:
        """(world_size,) int64: kept (query block, KV block) pairs of each rank, over all groups."""
        work = torch.zeros(self.world_size, dtype=torch.int64)
        return work.index_add_(0, self.q_owner, self.layout.row_counts.sum(0).cpu())

    # ---- what it costs -----------------------------------------------------------------------------------------------

    @property
    def shifts(self) -> tuple[int, ...]:
        """The hops that happen, 0 left out: those in which some rank sends."""
        ranks, shifts = torch.arange(self.world_size), range(1, self.world_size)
        return tuple(h for h in shifts if bool(self.traffic[ranks, (ranks - h) % self.world_size].any()))

    @cached_property
    def _largest_blocks(self) -> int:
        """The most blocks that any rank receives in one hop, each for one of the ``kv_groups``."""
        return int((self.traffic - torch.diag(self.traffic.diagonal())).max())

    @cached_property
    def imbalance(self) -> float:
        """max / mean of ``active_blocks``."""
        return imbalance(self.active_blocks)

    def block_bytes(self, kv_heads: int, head_dim: int, itemsize: int, batch: int = 1) -> int:
        """K and V of one block, for one of the ``kv_groups``."""
        return 2 * batch * kv_heads // self.kv_groups * self.layout.kv_block_size * head_dim * itemsize

    def bytes_needed(self, kv_heads: int, head_dim: int, itemsize: int, batch: int = 1) -> int:
        """K and V that some rank needs and does not own, summed over ranks, in one forward; true tokens only."""
        foreign = self.needs & (self.kv_owner != torch.arange(self.world_size)[:, None])[:, None]
        tokens = torch.full((self.layout.num_kv_blocks,), self.layout.kv_block_size)
        tokens[-1] -= self.layout.num_kv_blocks * self.layout.kv_block_size - self.layout.kv_len
        per_token = self.block_bytes(kv_heads, head_dim, itemsize, batch) // self.layout.kv_block_size
        return int((foreign.sum((0, 1)) * tokens).sum()) * per_token

    def bytes_sent(self, kv_heads: int, head_dim: int, itemsize: int, batch: int = 1) -> int:
        """What one forward puts on the wire, summed over ranks; a ragged block travels padded."""
        return away(self.traffic) * self.block_bytes(kv_heads, head_dim, itemsize, batch)

    def bytes_full_ring(self, kv_heads: int, head_dim: int, itemsize: int, batch: int = 1) -> int:
        """What a ring that sends every block to every rank would put on the wire."""
        return (self.world_size - 1) * 2 * batch * kv_heads * self.layout.kv_len * head_dim * itemsize

    def largest_buffer(self, kv_heads: int, head_dim: int, itemsize: int, batch: int = 1) -> int:
        """Bytes of the largest K and V received in one hop by any rank."""
        return self._largest_blocks * self.block_bytes(kv_heads, head_dim, itemsize, batch)

    def describe(self, kv_heads: int = 1, head_dim: int = 64, itemsize: int = 2, batch: int = 1) -> str:
        """The plan in a few lines of text."""
        size = (kv_heads, head_dim, itemsize, batch)
        sent, needed, full = self.bytes_sent(*size), self.bytes_needed(*size), self.bytes_full_ring(*size)
        share = f"{sent / full:.1%} of a full ring's {full / 2**20:.1f} MiB" if full else "nothing to send to"
        return "\n".join(
            [
                f"RingPlan: {self.world_size} ranks, {len(self.shifts)} hops, {self.layout}",
                f"sent in a forward: {sent / 2**20:.1f} MiB ({needed / 2**20:.1f} needed), {share}",
                f"active blocks a rank: {self.active_blocks.tolist()}, max / mean {self.imbalance:.3f}",
                f"largest buffer: {self.largest_buffer(*size) / 2**20:.1f} MiB",
            ]
        )

    # ---- what a rank does ----------------------------------------------------------------------------------------

    def of_rank(self, rank: int) -> RankPlan:
        """One rank's part, made once. Layouts stay on the layout's device, places to send and receive go there too."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank must lie in 0..{self.world_size - 1}, got {rank}")
        if rank not in self._ranks:
            mine = (self.q_owner == rank).nonzero()[:, 0]
            layout = self.layout.select(mine, None)
            self._ranks[rank] = RankPlan(rank, layout, tuple(self._hops(rank, layout)))
        return self._ranks[rank]

    def _hops(self, rank: int, layout: BlockLayout) -> Iterator[Hop]:
        nothing = torch.zeros(1, 0, dtype=torch.bool)
        for shift in (0, *self.shifts):
            source, target = (rank - shift) % self.world_size, (rank + shift) % self.world_size
            given = self.needs[target][:, self.kv_owner == rank] if shift else nothing
            taken = self.needs[rank] & (self.kv_owner == source)
            kv_blocks = (taken.any(0) if shift else self.kv_owner == rank).nonzero()[:, 0]
            received = taken[:, kv_blocks] if shift else nothing
            yield self._hop(layout, shift, source, target, _places(given), _places(received), kv_blocks)

    def _hop(
        self, layout: BlockLayout, shift: int, source: int, target: int, send: Tensor, places: Tensor, kv_blocks: Tensor
    ) -> Hop:
        device = layout.device
        seen = layout.select(None, kv_blocks)
        busy = (seen.row_counts.sum(0) > 0).nonzero()[:, 0]
        assert layout.q_block_ids is not None
        q_blocks = layout.q_block_ids[busy]
        sub, bias_index = layout.select(q_blocks, kv_blocks, return_index=True)
        size, tokens = layout.q_block_size, layout.q_tokens
        rows = (busy[:, None] * size + torch.arange(size, device=device)).view(-1)
        rows = rows[rows < tokens]
        every = len(busy) == layout.num_q_blocks
        send, places, kv_blocks = send.to(device), places.to(device), kv_blocks.to(device)
        return Hop(shift, source, target, send, places, kv_blocks, q_blocks, sub, bias_index, None if every else rows)

    @cached_property
    def digest(self) -> str:
        """A stable hash, equal on every rank that plans the same."""
        return f"{self.layout.digest()}:{self.partition.digest()}:{self.queries_per_kv}"


class _Plans(list[RingPlan]):
    """What a layout keeps; a copy of the layout, or what another process gets of it, begins without."""

    def __reduce__(self) -> tuple[type[_Plans], tuple[()]]:
        return (_Plans, ())


def plan_for(layout: BlockLayout, partition: Partition, *, queries_per_kv: int = 1) -> RingPlan:
    """The plan of a layout, made once.

    The layout itself keeps it: a plan refers to its layout, so any other place would keep both for ever. Only the
    newest few stay, as each generation has a partition of its own.
    """
    plans: _Plans = layout.__dict__.setdefault("_ring_plans", _Plans())
    for plan in tuple(plans):
        if plan.partition is partition and plan.queries_per_kv == queries_per_kv:
            return plan
    made = RingPlan(layout, partition, queries_per_kv=queries_per_kv)
    plans.append(made)
    del plans[:-PLANS_KEPT]
    return made  # plans[-1] may be another thread's


def _places(wanted: Tensor) -> Tensor:
    """(n,) int64 flat places of what is True."""
    return wanted.reshape(-1).nonzero()[:, 0]


def _check(layout: BlockLayout, partition: Partition, queries_per_kv: int) -> None:
    if layout.q_block_ids is not None or layout.kv_block_ids is not None:
        raise ValueError("a ring plan needs the layout of the whole sequence, got a selection of blocks")
    if (layout.q_len, layout.kv_len) != (partition.seq_len, partition.seq_len):
        raise ValueError(
            f"the layout must be of the partition's {partition.seq_len} tokens, got {layout.q_len} x {layout.kv_len}"
        )
    if queries_per_kv < 1 or (layout.num_groups > 1 and layout.num_groups % queries_per_kv):
        raise ValueError(
            f"queries_per_kv must be positive and divide the layout's {layout.num_groups} groups, got {queries_per_kv}"
        )
