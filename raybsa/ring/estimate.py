"""estimate: the Work of a family of patterns over thousands of ranks, without a layout and without a plan.

Every rank owns a few runs of neighbouring blocks (one where contiguous, two where zigzag). How many kept pairs lie
between two runs follows from prefix sums over the rows and two binary searches, what a rank needs of a run from the
union of its rows' runs. O(num_blocks + world_size²) work and memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raybsa.ring.partition import STARTS
from raybsa.ring.rows import Rows
from raybsa.ring.work import Work, by_shift, from_pairs

EVEN_ENOUGH = 1.05  # max / mean of active blocks up to which "balanced" is taken as contiguous
SEEN = 0.5  # expected blocks of all ranks together below which a hop is taken as empty


def estimate(
    rows: Rows,
    world_size: int,
    *,
    partition: str = "balanced",
    block_size: int = 128,
    heads: int = 1,
    heads_joined: int = 1,
) -> Work:
    """What each rank computes and receives.

    Args:
        rows: of the whole sequence.
        world_size: ranks, at most the number of blocks.
        partition: ``"contiguous"``, ``"zigzag"`` or ``"balanced"``, which is estimated as the contiguous one where that
            is even, else as the zigzag one (a real one starts from either and swaps blocks: its traffic differs).
        block_size: tokens of a block.
        heads: query heads; counts where they draw for themselves.
        heads_joined: of these, how many share a KV head.

    Raises:
        ValueError: another partition, or more ranks than blocks.
    """
    if partition not in ("balanced", "contiguous", "zigzag"):
        raise ValueError(f"an estimate knows the partitions balanced, contiguous and zigzag, got {partition!r}")
    if not 1 <= world_size <= rows.num_blocks:
        raise ValueError(f"world_size must lie in 1..{rows.num_blocks}, the number of blocks, got {world_size}")
    if partition == "balanced":
        plain = _Runs.of(STARTS["contiguous"](rows.num_blocks, world_size), world_size)
        partition = "contiguous" if plain.unevenness(rows) <= EVEN_ENOUGH else "zigzag"
    runs = _Runs.of(STARTS[partition](rows.num_blocks, world_size), world_size)
    meeting = _Meeting(rows, runs, *((heads, heads_joined) if rows.heads_differ else (1, 1)))
    counts = [meeting.of_rank(rank) for rank in range(world_size)]
    active, busy, needed = (np.stack([count[i] for count in counts]) for i in range(3))
    shifts = np.arange(1, world_size)
    shifts = np.concatenate([[0], shifts[by_shift(needed, shifts).sum(1) > SEEN]])
    owned = np.bincount(runs.owner, runs.end - runs.begin, world_size)
    sizes = (rows.num_blocks * block_size, block_size, block_size)
    return from_pairs(sizes, shifts, active, busy, needed, owned)


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs of neighbouring blocks with one owner, in order: ``begin .. end - 1`` belongs to ``owner``."""

    begin: np.ndarray
    end: np.ndarray
    owner: np.ndarray
    world_size: int

    @classmethod
    def of(cls, owner: np.ndarray, world_size: int) -> _Runs:
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(owner)) + 1, [len(owner)]])
        return cls(cuts[:-1], cuts[1:], owner[cuts[:-1]], world_size)

    @cached_property
    def cuts(self) -> np.ndarray:
        return np.concatenate([self.begin, self.end[-1:]])

    def unevenness(self, rows: Rows) -> float:
        """max / mean of the ranks' kept pairs."""
        kept = _prefix(rows.end - rows.first + rows.sinks + rows.scattered)
        each = self.by_owner(kept[self.end] - kept[self.begin])
        return float(each.max() / each.mean())

    def by_owner(self, of_runs: np.ndarray) -> np.ndarray:
        return np.bincount(self.owner, of_runs, self.world_size)


class _Interval:
    """Rows that keep ``low[i] .. high[i] - 1``, both never falling: how many pairs lie left of each cut."""

    def __init__(self, low: np.ndarray, high: np.ndarray, cuts: np.ndarray) -> None:
        self._cuts = cuts
        self._whole, self._begun = np.searchsorted(high, cuts, "right"), np.searchsorted(low, cuts, "left")
        self._lows, self._lengths = _prefix(low), _prefix(high - low)

    def pairs(self, begin: int, end: int) -> np.ndarray:
        """(runs,) kept pairs of the rows ``begin .. end - 1`` in each run of columns."""
        return np.diff(self._left_of(end) - self._left_of(begin))

    def touched(self, begin: int, end: int) -> np.ndarray:
        """(runs,) how many of these rows keep something in each run of columns."""
        return np.maximum(0, np.minimum(end, self._begun[1:]) - np.maximum(begin, self._whole[:-1]))

    def _left_of(self, row: int) -> np.ndarray:
        whole = np.minimum(row, self._whole)
        begun = np.maximum(np.minimum(row, self._begun), whole)
        return self._lengths[whole] + self._cuts * (begun - whole) - (self._lows[begun] - self._lows[whole])


class _Meeting:
    """What the rows of one rank keep in, and need of, the blocks of every rank."""

    def __init__(self, rows: Rows, runs: _Runs, heads: int, heads_joined: int) -> None:
        self._rows, self._runs, self._size = rows, runs, runs.end - runs.begin
        self._all_heads = heads / heads_joined
        self._near = [_Interval(rows.first, rows.end, runs.cuts)]
        if rows.sinks.any():
            self._near.append(_Interval(np.zeros_like(rows.sinks), rows.sinks, runs.cuts))
        self._scatters = bool(rows.scattered.any())
        reach = np.arange(rows.num_blocks) if rows.causal else np.full(rows.num_blocks, rows.num_blocks - 1)
        share = np.minimum(rows.scattered / np.maximum(reach, 1), 1.0 - 1e-12)
        self._scattered, self._shares = _prefix(rows.scattered), _prefix(share)
        self._missed = _prefix(heads_joined * np.log1p(-share))

    def of_rank(self, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(world_size,) three times: kept pairs, rows with a kept pair, and blocks needed, of each rank's blocks."""
        runs, size = self._runs, self._size
        pairs, near, missed = (np.zeros(len(size)) for _ in range(3))
        rows = np.zeros(runs.world_size)
        mine = [(int(runs.begin[i]), int(runs.end[i])) for i in np.flatnonzero(runs.owner == rank)]
        for begin, end in mine:
            for kept in self._near:
                pairs += kept.pairs(begin, end)
            touched = np.max([kept.touched(begin, end) for kept in self._near], axis=0).astype(float)
            if self._scatters:
                drawn, none = self._drawn(begin, end)
                pairs += drawn
                missed += none
                touched += (end - begin - touched) * -np.expm1(none * self._all_heads * size / (end - begin))
            rows += np.minimum(runs.by_owner(touched), end - begin)
        for low, high in self._union(mine):
            near += np.maximum(0, np.minimum(high, runs.end) - np.maximum(low, runs.begin))
        needed = near - (size - near) * np.expm1(missed) if self._scatters else near
        return runs.by_owner(pairs), rows, runs.by_owner(needed)

    def _drawn(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(runs,) twice: the pairs that rows ``begin .. end - 1`` are expected to draw in each run of columns, and the
        log of the chance that one block of it is drawn by none of them. Runs are either equal or apart."""
        share = self._shares[end] - self._shares[begin]
        own = self._runs.begin == begin
        if not self._rows.causal:
            return (self._size - own) * share, np.full(len(own), self._missed[end] - self._missed[begin])
        before = self._runs.end <= begin
        within = self._scattered[end] - self._scattered[begin] - begin * share
        drawn = np.where(before, self._size * share, np.where(own, within, 0.0))
        return drawn, before * (self._missed[end] - self._missed[begin])

    def _union(self, mine: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Disjoint runs of columns that some row of the rank keeps for sure."""
        first, end, sinks = self._rows.first, self._rows.end, self._rows.sinks
        runs = [(int(first[a]), int(end[b - 1])) for a, b in mine] + [(0, int(sinks[b - 1])) for _, b in mine]
        apart, reached = [], 0
        for low, high in sorted(runs):
            if high > max(low, reached):
                apart.append((max(low, reached), high))
                reached = high
        return apart


def _prefix(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, x.dtype), np.cumsum(x)])
