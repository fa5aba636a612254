"""The best columns of each row, the same on every device: equal scores go to the lower column."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMN_BITS = 31
MAX_COLUMNS = 2**COLUMN_BITS


def top_columns(preferences: Tensor, count: int) -> Tensor:
    """(..., count) int64: the ``count`` columns of each row with the highest ``preferences`` (..., n), best first.

    Score and column make one 64-bit number, so that no two are equal and no order of ties is left to a library.
    -0.0 counts as 0.0; a score must not be NaN.
    """
    columns = torch.arange(preferences.shape[-1], device=preferences.device)
    keys = (_ordered(preferences).long() << COLUMN_BITS) | (MAX_COLUMNS - 1 - columns)
    best = torch.topk(keys, count, dim=-1).values
    return MAX_COLUMNS - 1 - (best & (MAX_COLUMNS - 1))


def _ordered(scores: Tensor) -> Tensor:
    """int32 numbers in the order of the float32 ``scores``."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
