"""BlockSparseBase: block-sparse attention over q, k and v, without projections or parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from raybsa.variants.attend import attend
from raybsa.variants.source import LayoutSource, PatternLike, fixed_pattern


class BlockSparseBase(nn.Module):
    """The true softmax attention over the blocks that a pattern keeps.

    Args:
        segment_lengths, dilation_rates: lists of equal length; together they name the dilated pattern (tokens of a
            segment, and the stride in blocks within it).
        pattern: a rule, its PatternSpec or that spec's dict, or a family's name, instead of the two lists. With no
            pattern at all: a sliding window at density 0.1.
        density: share of the allowed blocks to keep, in (0, 1]; None keeps what the pattern gives by itself.
        block_size: tokens of a block, a power of two.
        causal: query i sees key j only if ``j <= i``.
        dropout: share of the attention weights to drop while training, in [0, 1).
        scale: factor on the scores; None means ``1 / sqrt(D)``.
        backend: as in ``block_sparse_attention``.

    Attributes:
        source: the ``LayoutSource`` that says which blocks a call keeps.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names what was wanted and what came.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        *,
        pattern: PatternLike | None = None,
        density: float | None = None,
        block_size: int = 64,
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        self.source: LayoutSource = fixed_pattern(
            pattern, segment_lengths, dilation_rates, density=density, block_size=block_size, causal=causal
        )
        self.dropout = dropout
        self.scale = scale
        self.backend = backend

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attn_mask: Tensor | None = None,
        segment_ids: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, H, Sq, D) in q's dtype. A query with nothing to attend gives 0.

        Args:
            q: (B, H, Sq, D).
            k, v: (B, Hkv, Skv, D) with H a multiple of Hkv.
            attn_mask: broadcastable to (B, H, Sq, Skv); bool (True = attend) or added to the scores.
            segment_ids: int tensors (B, Sq) and (B, Skv); tokens of different segments do not see each other.
        """
        return attend(
            self.source,
            q,
            k,
            v,
            scale=self.scale,
            attn_mask=attn_mask,
            segment_ids=segment_ids,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale:g}"
        return f"{self.source}, dropout={self.dropout:g}{scale}, backend={self.backend!r}"
