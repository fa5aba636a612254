"""What a dense mask says of blocks: which tokens take part, and which pairs of blocks may judge one another.

The mask is read once, some rows of blocks at a time. What is kept is O(n) for tokens and two bits a pair of blocks,
beside the number a pair of tokens that the caller made. A pair of blocks sees each other *whole* where it holds as many
visible pairs of tokens as it has queries that see something times keys that someone sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.selectors.segment_blocks import as_blocks

HIDDEN = -1e4  # what is added to a score and hides its key, or less: no weight is left of it in any dtype
_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}  # numbers of the mask


@dataclass(frozen=True, eq=False)
class MaskBlocks:
    """b is B or 1; g is Hkv or 1, the query heads of a KV head taken together; R is 1 where the mask has one row.

    Args:
        judged: (b, g, R, C) bool: the pair sees each other whole, and so does the row the column's block before, where
            ``reads_before`` says that the column tells of it.
        seen: (b, g, R, C) bool: some query of some head sees some key.
        sees: (b, g, Sq) bool: queries that see some key.
        shown: (b, g, Skv) bool: keys that some query sees.
        reads_before: (b, g, C) bool: whether some row that may judge a block sees the one before it, too.
        own, before, first: (b, g, n) bool: whether all queries of a block see the block itself, the block before it,
            the first token of the block. None where they all do, and where there are not as many queries as keys.
    """

    judged: Tensor
    seen: Tensor
    sees: Tensor
    shown: Tensor
    reads_before: Tensor
    own: Tensor | None = None
    before: Tensor | None = None
    first: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, q_len: int, kv_len: int, kv_heads: int, block_size: int, causal: bool) -> MaskBlocks:
        """Of a mask that broadcasts to (B, H, Sq, Skv): bool (True = visible) or added to the scores.

        ``causal``: rows judge only blocks before their own.
        """
        mask = mask[(None,) * (4 - mask.dim())].expand(-1, -1, -1, kv_len)
        mask = mask.unflatten(1, (1 if mask.shape[1] == 1 else kv_heads, -1))
        height = block_size if mask.shape[3] > 1 else 1
        counts, sees, shown = _count(mask, height, block_size)
        wanted = as_blocks(sees, height).sum(-1)[..., None] * as_blocks(shown, block_size).sum(-1)[:, :, None]
        whole, seen = counts == mask.shape[2] * wanted, counts > 0
        judged = whole & seen
        judged = judged.tril(-1) if causal and mask.shape[3] > 1 else judged
        to_both = F.pad(whole[..., :-1], (1, 0))
        reads_before = (judged & to_both).any(2)
        judged = judged & (to_both | ~reads_before[:, :, None])
        sees = sees.expand(-1, -1, q_len)
        itself = () if q_len != kv_len or mask.shape[2:4] == (1, 1) else _of_itself(mask, whole, sees, block_size)
        return cls(judged, seen, sees, shown, reads_before, *itself)

    def tile(self, place: slice | Tensor) -> tuple[Tensor, Tensor]:
        """(b, g, r, C) bool each, of the rows at ``place``: pairs that may judge by content; pairs of which no token
        sees another."""
        place = place if self.seen.shape[2] > 1 else slice(None)
        return self.judged[:, :, place], ~self.seen[:, :, place]

    def at(self, sample: Tensor, head: Tensor, place: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """The same of single pairs; the four broadcast."""
        index = (sample, head, place, column)
        return pick(self.judged, *index), ~pick(self.seen, *index)


def pick(x: Tensor, *index: Tensor) -> Tensor:
    """``x[index]``, with 0 for what is the same along a dimension of size 1."""
    return x[tuple(i if n > 1 else torch.zeros_like(i) for i, n in zip(index, x.shape, strict=True))]


def is_visible(mask: Tensor) -> Tensor:
    """bool: where a mask lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def with_infinity(mask: Tensor | None) -> Tensor | None:
    """The mask with -inf where it hides. A row that keeps no visible key then attends to nothing; a finite number that
    is added to all keys of a row would leave their weights as they are."""
    return mask if mask is None or mask.dtype == torch.bool else mask.masked_fill(~is_visible(mask), float("-inf"))


def _count(mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a mask (b, g, copies, rows, Skv): visible pairs of tokens in blocks of ``height`` by ``width``, over the
    copies; rows that see something, and keys that someone sees, in some copy."""
    counts, sees = [], []
    shown = torch.zeros_like(mask[:, :, 0, 0], dtype=torch.bool)
    step = height * max(1, _AT_ONCE.get(mask.device.type, 2**26) // max(1, height * mask[:, :, :, 0].numel()))
    for part in mask.split(step, 3):
        visible = is_visible(part)
        of_rows = as_blocks(visible, width).sum((2, 5)).transpose(2, 3)
        counts.append(as_blocks(of_rows, height).sum(-1).transpose(2, 3))
        visible = visible.any(2)
        sees.append(visible.any(-1))
        shown = shown | visible.any(2)
    return torch.cat(counts, 2), torch.cat(sees, 2), shown


def _of_itself(mask: Tensor, whole: Tensor, sees: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``own``, ``before`` and ``first`` of a mask (b, g, copies, rows, S) of S queries and keys."""
    tokens = mask.shape[-1]
    rows = whole.expand(-1, -1, whole.shape[3], -1)
    own, before = rows.diagonal(0, 2, 3), F.pad(rows.diagonal(-1, 2, 3), (1, 0))
    at = torch.arange(tokens, device=mask.device)
    to_first = is_visible(mask.expand(-1, -1, -1, tokens, -1)[:, :, :, at, at // block_size * block_size]).all(2)
    return own, before, ~as_blocks(sees & ~to_first, block_size).any(-1)
