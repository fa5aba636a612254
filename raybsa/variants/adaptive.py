"""BlockSparseAdaptive: attention whose blocks a learned selector chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from raybsa.kernels.eager import eagerly
from raybsa.layout import BlockLayout
from raybsa.spec import PatternSpec
from raybsa.variants.attend import attend
from raybsa.variants.selector import BlockSelector


class BlockSparseAdaptive(nn.Module):
    """``BlockSparseBase`` whose pattern is learned: each sample and KV head keeps the blocks that its gate chooses.

    Add ``selector_loss()`` to the loss of every training step and call ``step()`` after it.

    Args:
        segment_lengths, dilation_rates: lists of equal length that bound which blocks may be chosen; None: every
            allowed block.
        num_heads, head_dim: of q.
        num_kv_heads: of k; None: ``num_heads``.
        density: share of the allowed blocks to keep, in (0, 1].
        block_size: tokens of a block, a power of two.
        causal: query i sees key j only if ``j <= i``, and no choice looks at a later token.
        dropout, scale, backend: as in ``BlockSparseBase``.
        options: the others of ``BlockSelector``: method, gate_dim, sinks, window, max_blocks, top_p, warmup,
            anneal, temperature, sample_rows, seed.

    Attributes:
        source: the ``BlockSelector``.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names what was wanted and what came.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        num_heads: int | None = None,
        head_dim: int | None = None,
        *,
        num_kv_heads: int | None = None,
        density: float = 0.1,
        block_size: int = 64,
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        if num_heads is None or head_dim is None:
            raise ValueError(
                f"the adaptive pattern needs num_heads and head_dim, for its parameters: got {num_heads} and {head_dim}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        self.source = BlockSelector(
            num_heads,
            head_dim,
            num_kv_heads=num_kv_heads,
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            density=density,
            block_size=block_size,
            causal=causal,
            **options,
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
        """(B, H, Sq, D) in q's dtype. Arguments as in ``BlockSparseBase``. torch.compile leaves it as it is."""
        return eagerly(self._attend, q, k, v, attn_mask, segment_ids)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, segment_ids: tuple[Tensor, Tensor] | None
    ) -> Tensor:
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

    def selector_loss(self) -> Tensor:
        """() what to add to the loss of the last forward, see ``BlockSelector``."""
        return self.source.selector_loss()

    def step(self) -> None:
        """Tells the schedules that a step of training was applied."""
        self.source.step()

    def freeze(self, q: Tensor, k: Tensor) -> BlockLayout:
        """The fixed layout, a group a head, that the gate likes best over the samples of q and k."""
        return self.source.freeze(q, k)

    def freeze_to(self, path: str, q: Tensor, k: Tensor) -> PatternSpec:
        """The same, saved in a Parquet file, as a pattern for this geometry that any variant or search takes."""
        return self.source.freeze_to(path, q, k)

    def extra_repr(self) -> str:
        scale = "" if self.scale is None else f", scale={self.scale:g}"
        return f"dropout={self.dropout:g}{scale}, backend={self.backend!r}"
