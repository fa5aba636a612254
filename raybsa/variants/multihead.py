"""BlockSparseMultihead: ``nn.MultiheadAttention`` over the blocks that a pattern keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybsa.kernels.api import make_call
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.eager import eagerly
from raybsa.kernels.widths import nothing_to_attend
from raybsa.variants.mha_extra import attend, attend_extra_alone
from raybsa.variants.mha_inputs import check_inputs, translate_masks
from raybsa.variants.mha_nested import pad, unpad
from raybsa.variants.mha_weights import attention_weights
from raybsa.variants.selection import Selection
from raybsa.variants.selector import BlockSelector
from raybsa.variants.source import LayoutSource, PatternLike, layout_source


class BlockSparseMultihead(nn.MultiheadAttention):
    """A drop-in for ``nn.MultiheadAttention``: its arguments, parameters, initial weights and ``state_dict``.

    With the pattern ``"dense"`` it computes the same. It differs in this:

    - A query with nothing to attend gives 0 (before the output projection) where torch gives nan or 0.
    - ``causal`` makes every call causal by its layout, with no mask at all. The hint ``is_causal=True`` then says that
      ``attn_mask`` is the causal mask, which is not read. Without ``causal`` the hint changes nothing, and attn_mask
      is read.
    - Keys of ``add_bias_kv`` and ``add_zero_attn`` belong to no block; every query sees them.
    - The fused path of ``nn.TransformerEncoderLayer`` is dense, so the layer must not take it:
      ``_qkv_same_embed_dim``, which the layer asks, is always False. ``nn.TransformerEncoder``, which asks it too,
      then warns unless it is made with ``enable_nested_tensor=False``.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            ``nn.MultiheadAttention``.
        segment_lengths, dilation_rates, pattern, density, block_size, causal, backend: as in ``BlockSparseBase``. The
            pattern ``"adaptive"`` (``{"name": "adaptive", "params": {...}}``) is learned: its parameters are the
            options of ``BlockSelector``, and ``state_dict`` then holds ``source.*`` too.

    Attributes:
        source: the ``LayoutSource`` that says which blocks a call keeps.

    Raises:
        ValueError, TypeError: arguments that do not fit; the message names what was wanted and what came.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        pattern: PatternLike | None = None,
        density: float | None = None,
        block_size: int = 64,
        causal: bool = False,
        backend: str = "auto",
    ) -> None:
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a positive multiple of num_heads, got {embed_dim} and {num_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout!r}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        source = layout_source(
            pattern,
            segment_lengths,
            dilation_rates,
            density=density,
            block_size=block_size,
            causal=causal,
            num_heads=num_heads,
            head_dim=self.head_dim,
        )
        self.source: LayoutSource = (
            source.to(device=device, dtype=dtype) if isinstance(source, BlockSelector) else source
        )
        self.backend = backend

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: masks say True for what may NOT be attended.

        Args:
            query: (L, E), (L, B, E), or (B, L, E) where ``batch_first``; or nested, with query, key and value one
                tensor and no mask.
            key, value: the same with length S and the widths kdim and vdim.
            key_padding_mask: (B, S), or (S,) for unbatched input; bool or float.
            need_weights: also return the weights. They are dense, O(L * S): pass False where you do not look at them.
            attn_mask: (L, S) or (B * num_heads, L, S); bool or float.
            average_attn_weights: average the weights over heads.
            is_causal: a hint that attn_mask is the causal mask, see the class.

        Returns:
            out shaped like query, and None or the weights: (B, L, S), without average (B, num_heads, L, S), without
            their batch for unbatched input. Extra keys come last, S + 1 or S + 2.
        """
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return self._over(self.source, self.backend, query, key, value, *masks)

    def _over(
        self,
        source: LayoutSource,
        backend: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``forward`` over the blocks of a source."""
        if query.is_nested or key.is_nested or value.is_nested:
            self._check_nested(query, key, value, key_padding_mask, attn_mask)
            padded, padding = pad(query)
            rest = (padding, need_weights, None, average_attn_weights, False)
            out, weights = self._over(source, backend, padded, padded, padded, *rest)
            return unpad(out, padding), weights
        check_inputs(query, key, value, (self.embed_dim, self.kdim, self.vdim), 0 if self.batch_first else 1)
        q, k, v = (self._to_heads(x) for x in self._project(query, key, value))
        masks = (attn_mask, key_padding_mask, is_causal)
        has_extra_keys = self.bias_k is not None or self.add_zero_attn
        if need_weights or has_extra_keys or isinstance(source, BlockSelector):  # these need the layout itself
            heads, weights = eagerly(self._attend, source, backend, q, k, v, *masks, need_weights)
        else:
            heads, weights = self._attend(source, backend, q, k, v, *masks, False)
        out = self.out_proj(self._from_heads(heads, batched=query.dim() == 3))
        if weights is None:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights if query.dim() == 3 else weights[0]

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout:g}, "
            f"batch_first={self.batch_first}, {self.source}, backend={self.backend!r}"
        )

    def _attend(
        self,
        source: LayoutSource,
        backend: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, L, D) of the heads, and (B, H, L, S) their weights where needed."""
        extra = self._extra_keys(k, v)
        nothing = nothing_to_attend(q, k, v)
        if nothing is not None and extra is None:
            return nothing[0], q.new_zeros(*q.shape[:3], k.shape[2]) if need_weights else None
        if nothing is not None and extra is not None:
            heads, weights = attend_extra_alone(q, *extra, self.head_dim**-0.5, self.dropout if self.training else 0.0)
            return heads, F.pad(weights, (k.shape[2], 0)) if need_weights else None
        with_lse = extra is not None
        selection, call = self._select(source, q, k, v, attn_mask, key_padding_mask, is_causal, with_lse)
        heads = source.complete(selection, call, attend(call, extra, backend))
        return heads, attention_weights(call, None if extra is None else extra[0]) if need_weights else None

    def _select(
        self,
        source: LayoutSource,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
        with_lse: bool,
    ) -> tuple[Selection, AttentionCall]:
        if is_causal and source.causal:
            attn_mask = None
        elif is_causal and attn_mask is None:
            raise ValueError(
                "is_causal is a hint about attn_mask and needs it, got None; causal=True in the constructor needs none"
            )
        attn_mask, segment_ids = translate_masks(attn_mask, key_padding_mask, q, k)
        selection = source.select(q, k, attn_mask, segment_ids)
        call = make_call(
            q,
            k,
            v,
            selection.layout,
            attn_mask=attn_mask if selection.attn_mask is None else selection.attn_mask,
            segment_ids=segment_ids,
            block_bias=selection.block_bias,
            dropout_p=self.dropout if self.training else 0.0,
            return_lse=with_lse,
        )
        return selection, call

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = apart if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _to_heads(self, x: Tensor) -> Tensor:
        """(B, H, L, D) of (L, E), (L, B, E) or (B, L, E)."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _from_heads(self, x: Tensor, batched: bool) -> Tensor:
        """The inverse of ``_to_heads``."""
        if not batched:
            return x[0].transpose(0, 1).flatten(1)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(2)

    def _extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """(B, H, E, D) each: what add_bias_kv learns, then what add_zero_attn adds; None without either."""
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.view(1, self.num_heads, 1, self.head_dim).to(k.dtype))
            values.append(self.bias_v.view(1, self.num_heads, 1, self.head_dim).to(v.dtype))
        if self.add_zero_attn:
            keys.append(k.new_zeros(1, self.num_heads, 1, self.head_dim))
            values.append(v.new_zeros(1, self.num_heads, 1, self.head_dim))
        if not keys:
            return None
        batch = (k.shape[0], -1, -1, -1)
        return torch.cat(keys, 2).expand(batch), torch.cat(values, 2).expand(batch)

    def _check_nested(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        strided = query.is_nested and query.layout == torch.strided
        if not (strided and query is key and key is value and self.batch_first):
            raise ValueError(
                "nested input must be strided, with query, key and value one tensor, and batch_first=True, got "
                f"layout {query.layout}, one tensor: {query is key and key is value}, batch_first={self.batch_first}"
            )
        if key_padding_mask is not None or attn_mask is not None:
            raise ValueError("nested input takes no key_padding_mask and no attn_mask, got one")
