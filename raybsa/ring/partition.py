"""Partition: which rank owns which blocks of the sequence. Pure data, the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from raybsa.axis import num_blocks
from raybsa.layout import BlockLayout
from raybsa.ring.needs import away, needed_blocks, traffic

BALANCED_ENOUGH = 1.005  # max / mean of active blocks at which balancing stops
NOTHING = -1  # taken back for a block that is given


@dataclass(frozen=True, eq=False)
class Partition:
    """The blocks of one sequence, dealt to ranks. A rank keeps its blocks in ascending order, so the ragged last block
    of the sequence is the last of the rank that owns it.

    Args:
        seq_len: tokens of the whole sequence.
        block_size: tokens of a block, the unit that is dealt.
        owner: (num_blocks,) int64, the rank of each block; every rank of ``0 .. world_size - 1`` owns at least one.
        world_size: ranks.

    Raises:
        ValueError: an owner out of range, or a rank without a block.
    """

    seq_len: int
    block_size: int
    owner: Tensor
    world_size: int

    def __post_init__(self) -> None:
        wanted = num_blocks(self.seq_len, self.block_size)
        if self.owner.shape != (wanted,) or self.owner.dtype != torch.int64:
            raise ValueError(f"owner must be int64 ({wanted},), got {self.owner.dtype} {tuple(self.owner.shape)}")
        if not 1 <= self.world_size <= wanted:
            raise ValueError(
                f"world_size must lie in 1..{wanted}, the blocks of {self.seq_len} tokens at block size "
                f"{self.block_size}, got {self.world_size}: every rank owns at least one"
            )
        if int(self.owner.min()) < 0 or len(self.counts) > self.world_size or bool((self.counts == 0).any()):
            raise ValueError(f"every rank of 0..{self.world_size - 1} must own a block, got {self.counts.tolist()}")

    @cached_property
    def counts(self) -> Tensor:
        """(world_size,) int64: blocks of each rank."""
        return torch.bincount(self.owner, minlength=self.world_size)

    def blocks(self, rank: int, block_size: int | None = None) -> Tensor:
        """(n,) int64, ascending: the global ids of a rank's blocks, counted in blocks of ``block_size`` tokens."""
        return (self.owner_of(block_size or self.block_size) == rank).nonzero()[:, 0]

    def owner_of(self, block_size: int) -> Tensor:
        """(num_blocks,) int64: the rank of each block of ``block_size`` tokens.

        Raises:
            ValueError: such blocks would lie on several ranks.
        """
        if block_size == self.block_size:
            return self.owner
        if block_size >= 1 and self.block_size % block_size == 0:
            fine = self.owner.repeat_interleave(self.block_size // block_size)
            return fine[: num_blocks(self.seq_len, block_size)]
        if block_size >= 1 and block_size % self.block_size == 0:
            times = block_size // self.block_size
            first = self.owner[::times]
            if torch.equal(first.repeat_interleave(times)[: len(self.owner)], self.owner):
                return first
        raise ValueError(
            f"blocks that lie on one rank each were wanted, as those that divide the partition's {self.block_size} "
            f"tokens do, got blocks of {block_size}"
        )

    def tokens(self, rank: int) -> Tensor:
        """(n,) int64, ascending: the global positions of a rank's tokens, in the order in which it holds them."""
        places = self.blocks(rank)[:, None] * self.block_size + torch.arange(self.block_size)
        flat = places.reshape(-1)
        return flat[flat < self.seq_len]

    @cached_property
    def permutation(self) -> Tensor:
        """(seq_len,) int64: global positions in the order rank 0's tokens, rank 1's tokens, ..."""
        return torch.cat([self.tokens(rank) for rank in range(self.world_size)])

    @cached_property
    def inverse(self) -> Tensor:
        """(seq_len,) int64: ``joined[inverse]`` puts the ranks' joined tokens back into global order."""
        return torch.argsort(self.permutation)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(len(self.tokens(rank)) for rank in range(self.world_size))

    def shard(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """A rank's tokens of a whole tensor: ``dim`` shrinks from seq_len to ``lengths[rank]``."""
        if x.shape[dim] != self.seq_len:
            raise ValueError(f"dimension {dim} must hold {self.seq_len} tokens, got {tuple(x.shape)}")
        return x.index_select(dim, self.tokens(rank).to(x.device))

    def join(self, shards: Sequence[Tensor], dim: int = 2) -> Tensor:
        """The whole tensor from all ranks' shards, in rank order."""
        came = tuple(shard.shape[dim] for shard in shards)
        if came != self.lengths:
            raise ValueError(f"shards must hold {self.lengths} tokens in dimension {dim}, got {came}")
        return torch.cat(list(shards), dim).index_select(dim, self.inverse.to(shards[0].device))

    def digest(self) -> str:
        """A stable hash, equal on every rank."""
        state = hashlib.sha256(repr((self.seq_len, self.block_size, self.world_size)).encode())
        state.update(self.owner.numpy().tobytes())
        return state.hexdigest()[:32]


def partition_for(
    layouts: Sequence[BlockLayout],
    world_size: int,
    *,
    strategy: str = "balanced",
    equal_counts: bool = True,
) -> Partition:
    """One partition for all layers of a model, so that activations are never dealt again between layers.

    Args:
        layouts: the layouts of the layers, all of one sequence (``q_len == kv_len``).
        world_size: ranks, at most the number of blocks.
        strategy: ``"contiguous"`` (rank r holds the r-th run), ``"zigzag"`` (the r-th run from either end),
            ``"striped"`` (block i goes to rank ``i % world_size``) or ``"balanced"`` (the contiguous or the zigzag
            one, with blocks swapped until the active blocks of the ranks differ least; the one that sends less).
        equal_counts: ranks hold equally many blocks (give or take one); False lets ``"balanced"`` move blocks as well.

    Raises:
        ValueError: an unknown strategy, layouts of different lengths, or more ranks than blocks.
    """
    if not layouts:
        raise ValueError("layouts must name at least one layer's layout, got none")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {sorted(STRATEGIES)}, got {strategy!r}")
    seq_len = layouts[0].q_len
    block_size = max(max(layout.q_block_size, layout.kv_block_size) for layout in layouts)
    for layout in layouts:
        if (layout.q_len, layout.kv_len) != (seq_len, seq_len):
            raise ValueError(
                f"the layouts of a ring must all be of one sequence, got {layout.q_len} x {layout.kv_len} tokens "
                f"beside {seq_len} x {seq_len}"
            )
        if layout.q_block_ids is not None or layout.kv_block_ids is not None:
            raise ValueError("a partition needs whole layouts, got a selection of blocks")
    count = num_blocks(seq_len, block_size)
    if not 1 <= world_size <= count:
        raise ValueError(
            f"world_size must lie in 1..{count}, the blocks of {seq_len} tokens at block size {block_size}, "
            f"got {world_size}"
        )
    if strategy != "balanced":
        return Partition(seq_len, block_size, torch.from_numpy(STARTS[strategy](count, world_size)), world_size)
    work = _work(layouts, block_size, count)
    candidates = []
    for start in ("contiguous", "zigzag"):
        owner = _balanced(STARTS[start](count, world_size), work, world_size, equal_counts)
        candidates.append(Partition(seq_len, block_size, torch.from_numpy(owner), world_size))
    return _that_sends_less(candidates, layouts, work)


def imbalance(active: Tensor) -> float:
    """max / mean of the ranks' active blocks; 1 where there is no work."""
    return float(active.max() / active.double().mean()) if int(active.sum()) else 1.0


def _contiguous(count: int, world_size: int) -> np.ndarray:
    return np.repeat(np.arange(world_size), _sizes(count, world_size))


def _zigzag(count: int, world_size: int) -> np.ndarray:
    """Every rank takes the first half of its share from the front and the second from the back."""
    sizes = _sizes(count, world_size)
    front = np.repeat(np.arange(world_size), -(-sizes // 2))
    back = np.repeat(np.arange(world_size), sizes // 2)
    return np.concatenate([front, back[::-1]])


def _striped(count: int, world_size: int) -> np.ndarray:
    return np.arange(count) % world_size


STARTS: dict[str, Callable[[int, int], np.ndarray]] = {
    "contiguous": _contiguous,
    "zigzag": _zigzag,
    "striped": _striped,
}
STRATEGIES = ("balanced", *STARTS)


def _sizes(count: int, world_size: int) -> np.ndarray:
    return count // world_size + (np.arange(world_size) < count % world_size)


def _work(layouts: Sequence[BlockLayout], block_size: int, count: int) -> np.ndarray:
    """(count,) active token pairs of each block of queries over all layers and groups, in blocks of the first layer.

    A layout that all heads share weighs as much as one per head; which of them stand for more heads is not known here,
    so every layout counts the mean of its groups.
    """
    work = np.zeros(count)
    for layout in layouts:
        rows = layout.row_counts.sum(0).double().cpu().numpy() / layout.num_groups
        pairs = rows * (layout.q_block_size * layout.kv_block_size)
        work += np.add.reduceat(pairs, np.arange(0, len(pairs), block_size // layout.q_block_size))
    return work


def _that_sends_less(candidates: Sequence[Partition], layouts: Sequence[BlockLayout], work: np.ndarray) -> Partition:
    """Of the candidates that are about as even as the evenest, the one whose ranks need fewest foreign tokens."""

    def unevenness(partition: Partition) -> float:
        return imbalance(torch.bincount(partition.owner, torch.from_numpy(work), partition.world_size))

    def tokens_sent(partition: Partition) -> int:
        total = 0
        for layout in layouts:
            owners = [partition.owner_of(size) for size in (layout.q_block_size, layout.kv_block_size)]
            needed = needed_blocks(layout, owners[0], partition.world_size, 1)
            total += away(traffic(needed, owners[1])) * layout.kv_block_size
        return total

    evenest = min(unevenness(partition) for partition in candidates)
    even = [partition for partition in candidates if unevenness(partition) <= evenest + 0.01]
    return min(even, key=tokens_sent) if len(even) > 1 else even[0]


def _balanced(owner: np.ndarray, work: np.ndarray, world_size: int, equal_counts: bool) -> np.ndarray:
    """Swaps a block of the busiest rank for one of the idlest, the pair that halves their gap best, until all are even
    or no swap helps. Few blocks leave their neighbours, so few more bytes travel than with the partition it starts at.
    """
    loads = np.bincount(owner, weights=work, minlength=world_size)
    while loads.max() > loads.mean() * BALANCED_ENOUGH:
        busiest, idlest = int(loads.argmax()), int(loads.argmin())
        step = _best_step(work, owner, busiest, idlest, (loads[busiest] - loads[idlest]) / 2, equal_counts)
        if step is None:
            break
        given, taken = step
        owner[given] = idlest
        if taken != NOTHING:
            owner[taken] = busiest
        loads = np.bincount(owner, weights=work, minlength=world_size)
    return owner


def _best_step(
    work: np.ndarray, owner: np.ndarray, busiest: int, idlest: int, wanted: float, equal_counts: bool
) -> tuple[int, int] | None:
    """(block to give, block to take back or NOTHING) that moves closest to ``wanted`` work; None if none narrows the
    gap. Every step lowers the sum of the loads' squares, so stepping ends."""
    mine, theirs = (owner == busiest).nonzero()[0], (owner == idlest).nonzero()[0]
    weights = work[theirs]
    if not equal_counts and len(mine) > 1:
        theirs, weights = np.append(theirs, NOTHING), np.append(weights, 0.0)
    order = np.argsort(weights, kind="stable")
    theirs, weights = theirs[order], weights[order]
    place = np.searchsorted(weights, work[mine] - wanted)
    near = np.clip(np.stack([place - 1, place]), 0, len(theirs) - 1)
    miss = np.abs(work[mine] - weights[near] - wanted)
    at = np.unravel_index(int(miss.argmin()), miss.shape)
    if miss[at] >= wanted * (1 - 1e-9):
        return None
    return int(mine[at[1]]), int(theirs[near[at]])
