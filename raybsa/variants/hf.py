"""raybsa as an attention implementation of Hugging Face transformers (``pip install 'raybsa[hf]'``).

register(FixedPattern("bigbird", density=0.1, causal=True))
model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="raybsa")
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybsa.cache import LayoutCache
from raybsa.kernels.api import make_call, run_call
from raybsa.kernels.call import cast_inputs
from raybsa.layout import BlockLayout
from raybsa.variants.hf_masks import check_mask, make_mask
from raybsa.variants.selection import Selection
from raybsa.variants.source import FixedPattern, LayoutSource

# What models of transformers 5.23 ask of an attention beyond q, k, v, mask, scale and dropout, and would get silently
# wrong without: each is refused where it is given.
NOT_SERVED = (
    "block_indices",
    "cache",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "indices",
    "output_attentions",
    "position_bias",
    "s_aux",
    "sinks",
    "softcap",
)


def register(
    source: LayoutSource | Sequence[LayoutSource] | nn.ModuleList, name: str = "raybsa", *, backend: str = "auto"
) -> None:
    """Makes ``attn_implementation=name`` an attention over the blocks that ``source`` keeps, masks included.

    Args:
        source: a ``FixedPattern``, or a learned ``BlockSelector``; or a sequence of them, one a layer (by the
            attention module's ``layer_idx``). Every model of that name uses this very object, so a learned one is a
            submodule of one model, which trains and saves it.
        name: what models call it; an implementation of that name is replaced.
        backend: as in ``block_sparse_attention``.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no source, or sources of which some are causal and some are not.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("the adapter needs transformers: pip install 'raybsa[hf]'") from error
    by_layer = isinstance(source, Sequence | nn.ModuleList)
    sources: tuple[Any, ...] = tuple(source) if isinstance(source, Sequence | nn.ModuleList) else (source,)
    if len({one.causal for one in sources}) != 1:
        raise ValueError(f"sources that are all causal or all not were wanted, got {[one.causal for one in sources]}")
    AttentionInterface.register(name, HFAttention(sources, by_layer=by_layer, backend=backend))
    AttentionMaskInterface.register(name, partial(make_mask, sources[0].causal))


class HFAttention:
    """The function that a layer of a transformers model calls.

    A call with fewer queries than keys, as those that a KV cache makes, computes the last rows of the layout of the
    whole sequence up to there.
    """

    def __init__(self, sources: Sequence[LayoutSource], *, by_layer: bool, backend: str) -> None:
        self.sources = sources
        self.by_layer = by_layer
        self.backend = backend
        self._rows: LayoutCache[BlockLayout] = LayoutCache()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """(B, Sq, H, D) and no weights.

        Args:
            module: the layer's attention; its ``layer_idx`` and ``is_causal`` are read.
            query: (B, H, Sq, D).
            key, value: (B, Hkv, Skv, D), not repeated.
            attention_mask: None, (B, Skv) with True for the keys that count, or the whole mask, which broadcasts to
                (B, H, Sq, Skv): bool (True = attend) or added to the scores.
            dropout, scaling: as ``dropout_p`` and ``scale`` of ``block_sparse_attention``.
            is_causal: None is the module's.

        Raises:
            NotImplementedError: the model asks for what is not served, ``NOT_SERVED`` among it.
            ValueError: what the mask allows, or the model's causality, is not what the source's layouts are for.
        """
        asked = [name for name in NOT_SERVED if others.get(name) is not None and others[name] is not False]
        if asked:
            raise NotImplementedError(f"raybsa serves no {', '.join(asked)}; attn_implementation='eager' may")
        source = self._source(module)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        q, k, v = cast_inputs(query, key, value)
        mask = check_mask(attention_mask, q.shape[2], k.shape[2], source_causal=source.causal, model_causal=causal)
        if source.causal and q.shape[2] < k.shape[2]:
            layout, before = self._last_rows(source, q.shape[2], k.shape[2], q.shape[1], q.device)
            selection, q = Selection(layout), F.pad(q, (0, 0, before, 0))
            mask = mask if mask is None or mask.shape[-2] == 1 else F.pad(mask, (0, 0, before, 0))
        else:
            selection, before = source.select(q, k, mask), 0
        call = make_call(
            q,
            k,
            v,
            selection.layout,
            scale=scaling,
            attn_mask=mask,
            block_bias=selection.block_bias,
            dropout_p=dropout,
        )
        out = source.complete(selection, call, run_call(call, self.backend)[0])
        return out[:, :, before:].transpose(1, 2).contiguous(), None

    def _source(self, module: nn.Module) -> LayoutSource:
        if not self.by_layer:
            return self.sources[0]
        layer = getattr(module, "layer_idx", None)
        if layer is None or layer >= len(self.sources):
            raise ValueError(f"a source a layer was given, {len(self.sources)} in all, got a call of layer {layer}")
        return self.sources[layer]

    def _last_rows(
        self, source: LayoutSource, queries: int, tokens: int, heads: int, device: torch.device
    ) -> tuple[BlockLayout, int]:
        """The rows, in whole blocks, that hold the last ``queries`` of ``tokens`` queries, and how many come before
        the first of these in its block."""
        if not isinstance(source, FixedPattern):
            raise NotImplementedError(
                f"a learned source chooses by all {tokens} queries, got the last {queries} alone: generate with "
                "use_cache=False, or freeze it"
            )
        block, before = divmod(tokens - queries, source.block_size)

        def build() -> BlockLayout:
            whole = source.layout(tokens, tokens, heads, device)
            return whole.select(torch.arange(block, whole.num_q_blocks, device=device), None)

        return self._rows.get((id(source), block, tokens, heads, device), build), before
