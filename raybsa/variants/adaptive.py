"""BlockSparseAdaptive: attention whose blocks a learned selector chooses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class BlockSparseAdaptive(nn.Module):
    """Not there yet: its constructor raises NotImplementedError.

    Args:
        segment_lengths, dilation_rates: the dilated pattern to start from.
        num_heads, head_dim: the shape of q and k that the selector scores.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        raise NotImplementedError(
            "BlockSparseAdaptive needs the learned block selector, which is missing; "
            "BlockSparseBase takes any fixed pattern"
        )
