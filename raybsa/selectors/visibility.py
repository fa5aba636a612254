"""Visibility: what a choice of blocks may look at, where masks hide tokens from one another.

Nothing that is hidden from a token may change a bit of its output, so nothing hidden may decide on its blocks either.
Blocks are pooled over tokens that belong together, and only a pair of blocks that see each other whole is *judged* by
what is in them. Any other pair in which some token sees some token is scored by its position alone. *Hidden* pairs, in
which none does, come last of all that causality allows: a row keeps them only to keep its number of blocks.

Where there are as many queries as keys, they are the same tokens: a query goes into a row's choice only if that token,
as a key, is visible to the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raybsa.selectors.mask_blocks import MaskBlocks
from raybsa.selectors.pooling import blocks_before, per_head
from raybsa.selectors.rules import Rules
from raybsa.selectors.segment_blocks import BlockSegments, SegmentPairs


@dataclass(frozen=True, eq=False)
class Visibility:
    """Of one call. b is B or 1, g is Hkv or 1; None means all.

    Args:
        content: so many numbers of u and w, the first ones, tell of what is in the blocks; the others of positions.
        segments, masks: what the call's ``segment_ids`` and ``attn_mask`` say of pairs of blocks; None where not given.
        queries, keys: (b, g, S) bool: the tokens over which query and KV blocks are pooled.
        counted: (b, g, Sq) bool: the queries whose attention is distilled.
        reads_own, reads_before, reads_first: (b, g, R) bool: rows that may look at their own block, at the block before
            it, and at the first token of their own. Without causality a row that may not look at its own block looks
            where a causal row does.
        keys_before: (b, g, C) bool: KV blocks of which the block before tells too.
    """

    content: int
    segments: SegmentPairs | None = None
    masks: MaskBlocks | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    counted: Tensor | None = None
    reads_own: Tensor | None = None
    reads_before: Tensor | None = None
    reads_first: Tensor | None = None
    keys_before: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        content: int,
        rules: Rules,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None,
        segment_ids: tuple[Tensor, Tensor] | None,
    ) -> Visibility:
        """Of a call with q (B, H, Sq, D) and k (B, Hkv, Skv, D), and masks.

        Raises:
            ValueError, TypeError: masks that do not fit.
        """
        check_masks(q, k, attn_mask, segment_ids)
        found = cls(content)
        if segment_ids is not None:
            found = found._with_segments(rules, *(ids.long().contiguous() for ids in segment_ids))
        if attn_mask is not None:
            sizes = (q.shape[2], k.shape[2], k.shape[1], rules.block_size)
            masks = MaskBlocks.of(attn_mask, *sizes, rules.causal)
            found = found._with_masks(masks, q.shape[2] == k.shape[2])
        return found

    def _with_segments(self, rules: Rules, of_queries: Tensor, of_keys: Tensor) -> Visibility:
        size, every = rules.block_size, torch.ones_like(of_queries, dtype=torch.bool)
        known = of_queries.sort(1).values
        at = torch.searchsorted(known, of_keys).clamp(max=known.shape[1] - 1)
        shown = known.gather(1, at) == of_keys
        counted = of_queries == of_keys if of_queries.shape == of_keys.shape else every
        rows = BlockSegments.of(of_queries, counted, every, size, last=rules.causal)
        columns = BlockSegments.of(of_keys, shown, shown, size, last=rules.causal)
        return replace(
            self,
            segments=SegmentPairs(rows, columns),
            queries=(counted & rows.holds(of_queries, size))[:, None],
            keys=(shown & columns.holds(of_keys, size))[:, None],
            counted=counted[:, None],
            reads_before=rows.is_before(rows.low)[:, None],
            keys_before=columns.is_before(columns.segment)[:, None],
        )

    def _with_masks(self, masks: MaskBlocks, are_one: bool) -> Visibility:
        """``are_one``: queries and keys are the same tokens."""
        return replace(
            self,
            masks=masks,
            queries=_both(self.queries, masks.shown) if are_one else self.queries,
            keys=_both(self.keys, masks.shown),
            counted=_both(self.counted, masks.sees & masks.shown if are_one else masks.sees),
            reads_own=masks.own,
            reads_before=_both(self.reads_before, masks.before),
            reads_first=masks.first,
            keys_before=_both(self.keys_before, masks.reads_before),
        )

    @classmethod
    def of_shard(
        cls, content: int, size: int, ids: Tensor, blocks: BlockSegments, whole: BlockSegments, rows: Tensor
    ) -> Visibility:
        """Of a rank that holds some tokens of a sequence of queries and keys.

        Args:
            ids: (B, S) int64 segments of its tokens, which are whole blocks.
            blocks, whole: its blocks, and those of all ranks.
            rows: (R,) int64 the numbers of its blocks.
        """
        taken = blocks.holds(ids, size)[:, None]
        return cls(
            content,
            SegmentPairs(blocks, whole),
            queries=taken,
            keys=taken,
            reads_before=whole.is_before(whole.low)[:, None, rows],
            keys_before=whole.is_before(whole.segment)[:, None],
        )

    def tile(self, place: slice | Tensor) -> tuple[Tensor, Tensor]:
        """(b, g, r, C) bool each, of the rows at ``place``: pairs that are judged, and hidden ones."""
        return _of_all([pairs.tile(place) for pairs in (self.segments, self.masks) if pairs is not None])

    def at(self, group: Tensor, place: Tensor, column: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """The same of single pairs of the flat KV heads ``group``; the three broadcast."""
        sample, head = group // kv_heads, group % kv_heads
        found = [] if self.segments is None else [self.segments.at(sample, place, column)]
        found += [] if self.masks is None else [self.masks.at(sample, head, place, column)]
        return _of_all(found)

    def scores(self, scores: Tensor, u: Tensor, w: Tensor, place: slice | Tensor) -> tuple[Tensor, Tensor]:
        """(B, Hkv, r, C): ``scores`` of the rows u (B, Hkv, r, d) at ``place`` where they are judged, else of their
        positions alone; and (b, g, r, C) bool hidden pairs."""
        judged, hidden = self.tile(place)
        return torch.where(judged, scores, self.of_place(u) @ self.of_place(w).transpose(-1, -2)), hidden

    def of_place(self, x: Tensor) -> Tensor:
        """The part of u or w that tells of positions."""
        return x[..., self.content :]

    def readable(self, own: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Statistics (B, H, R, 3, D) of the rows' own blocks and of those before them, 0 where they may not look."""
        if before is None and self.reads_own is None:
            return own, None
        elsewhere = blocks_before(own) if before is None else before
        elsewhere, first = _cleared(elsewhere, self.reads_before), _cleared(own, self.reads_first)
        if before is not None:
            return first, elsewhere
        assert self.reads_own is not None
        return _chosen(self.reads_own, own, torch.cat([elsewhere[:, :, :, :2], first[:, :, :, 2:]], 3)), None

    def among_blocks(self) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """``attn_mask`` and ``segment_ids`` of an attention among blocks, in which the judged pairs see each other."""
        if self.masks is None and self.segments is not None:
            return None, self.segments.as_tokens()
        return self.tile(slice(None))[0], None


def check_masks(q: Tensor, k: Tensor, attn_mask: Tensor | None, segment_ids: tuple[Tensor, Tensor] | None) -> None:
    """Raises ValueError or TypeError where the masks of a call do not fit q (B, H, Sq, D) and k (B, Hkv, Skv, D)."""
    full = (*q.shape[:3], k.shape[2])
    for name, masks in (("attn_mask", (attn_mask,)), ("segment_ids", segment_ids or ())):
        if any(mask is not None and mask.device != q.device for mask in masks):
            raise ValueError(
                f"{name} must be on q's device, {q.device}, got {[str(x.device) for x in masks if x is not None]}"
            )
    if attn_mask is not None:
        sizes = zip(attn_mask.shape[::-1], full[::-1], strict=False)
        if attn_mask.dim() > 4 or not all(have in (1, want) for have, want in sizes):
            raise ValueError(f"attn_mask must broadcast to {full}, got {tuple(attn_mask.shape)}")
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            raise TypeError(f"attn_mask must be bool (True = attend) or floating point, got {attn_mask.dtype}")
    for side, ids, tokens in zip(("query", "key"), segment_ids or (), full[2:], strict=False):
        if ids.shape != (q.shape[0], tokens) or ids.is_floating_point():
            raise ValueError(
                f"segment_ids must be a pair of int tensors ({q.shape[0]}, {full[2]}) and ({q.shape[0]}, {full[3]}), "
                f"got {ids.dtype} {tuple(ids.shape)} for the {side} side"
            )


def _of_all(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pairs are judged where both segments and masks say so, hidden where one of them does."""
    judged, hidden = found[0]
    for others in found[1:]:
        judged, hidden = judged & others[0], hidden | others[1]
    return judged, hidden


def _both(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x & y


def _cleared(stats: Tensor, stays: Tensor | None) -> Tensor:
    return stats if stays is None else _chosen(stays, stats, 0.0)


def _chosen(where: Tensor, stats: Tensor, other: Tensor | float) -> Tensor:
    """Statistics (B, H, n, 3, D), ``other`` where ``where`` (b, g, n) is False."""
    return torch.where(per_head(where, stats.shape[1])[..., None, None], stats, other)
