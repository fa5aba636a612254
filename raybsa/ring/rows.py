"""Rows: a pattern family as a few numbers a row of blocks, for sequences whose layout is too large to build.

Row i keeps the KV blocks ``first[i] .. end[i] - 1``, the sinks ``0 .. sinks[i] - 1``, and ``scattered[i]`` others drawn
evenly from the rest of what it may see. Windows, sinks and dense layouts are so described exactly, random ones by their
expectation. O(num_blocks) numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from raybsa.patterns.budgets import even


@dataclass(frozen=True, eq=False)
class Rows:
    """What each query block keeps. ``first``, ``end`` and ``sinks`` never fall from a row to the next.

    Args:
        first, end: (num_blocks,) int64, the run of neighbours that row i keeps.
        sinks: (num_blocks,) int64, at most ``first``: the blocks at the sequence's start that it keeps besides.
        scattered: (num_blocks,) float64, how many other blocks it keeps, drawn evenly.
        causal: rows draw from the blocks before their own, else from all.
        heads_differ: whether each head draws for itself.
    """

    first: np.ndarray
    end: np.ndarray
    sinks: np.ndarray
    scattered: np.ndarray
    causal: bool
    heads_differ: bool = False

    def __post_init__(self) -> None:
        for name in ("first", "end", "sinks"):
            if bool((np.diff(getattr(self, name)) < 0).any()):
                raise ValueError(f"{name} must not fall from a row to the next")
        if bool((self.sinks > self.first).any()):
            raise ValueError("sinks must end where a row's run begins, or before")

    @property
    def num_blocks(self) -> int:
        return len(self.first)

    @property
    def active(self) -> float:
        """Kept pairs of one head."""
        return float((self.end - self.first + self.sinks + self.scattered).sum())

    @property
    def density(self) -> float:
        """Kept / allowed pairs."""
        n = self.num_blocks
        return self.active / (n * (n + 1) / 2 if self.causal else n * n)


def rows_of(
    family: str,
    num_blocks: int,
    *,
    causal: bool,
    density: float | None = None,
    window: int | None = None,
    sinks: int = 1,
) -> Rows:
    """The rows of a family, as ``raybsa.patterns`` makes them where q and KV blocks are equal.

    Args:
        family: ``"dense"``, ``"sliding_window"``, ``"sink_window"`` or ``"random"``.
        num_blocks: blocks of the whole sequence.
        density: kept / allowed blocks, the same number in all rows as far as they see so many; or
        window: blocks that a row sees to each side of its own, whatever the length.
        sinks: blocks at the start that all rows of ``"sink_window"`` see.

    Raises:
        ValueError: another family, or not exactly one of density and window where the family needs one.
    """
    if family not in FAMILIES:
        raise ValueError(f"statistics are known of {sorted(FAMILIES)}, got {family!r}: build its layout and its plan")
    i = np.arange(num_blocks)
    allowed = i + 1 if causal else np.full(num_blocks, num_blocks)
    if family == "dense":
        return _run(np.zeros_like(i), allowed, 0, causal)
    if (density is None) == (window is None) or (family == "random" and density is None):
        raise ValueError(f"{family} needs either a density or a window in blocks, got {density} and {window}")
    first_sinks = sinks if family == "sink_window" else 0
    if window is not None:
        return _run(np.maximum(i - window, 0), np.minimum(i + window + 1, allowed), first_sinks, causal)
    assert density is not None
    least = torch.from_numpy(1 + np.minimum(i, first_sinks))
    kept = even(least, torch.from_numpy(allowed), round(density * int(allowed.sum()))).numpy()
    if family == "random":
        return Rows(i, i + 1, np.zeros_like(i), (kept - 1).astype(float), causal, heads_differ=True)
    return _budgeted(i, kept, allowed, first_sinks, causal)


FAMILIES = ("dense", "sliding_window", "sink_window", "random")


def _run(first: np.ndarray, end: np.ndarray, sinks: int, causal: bool) -> Rows:
    return Rows(first, end, np.minimum(first, sinks), np.zeros(len(first)), causal)


def _budgeted(i: np.ndarray, kept: np.ndarray, allowed: np.ndarray, sinks: int, causal: bool) -> Rows:
    """A row of ``kept`` blocks: its own, then the sinks, then its neighbours to both sides."""
    before = np.minimum(np.minimum(kept - 1, sinks), i)
    width = kept - before
    first = i + 1 - width if causal else np.clip(i - width // 2, before, allowed - width)
    end = np.maximum.accumulate(first + width)  # at the sequence's ends an odd block more or less
    return Rows(np.maximum.accumulate(first), end, before, np.zeros(len(i)), causal)
