"""raybsa as an attention implementation of Hugging Face transformers (``pip install 'raybsa[hf]'``).

register(FixedPattern("bigbird", density=0.1, causal=True))
model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="raybsa")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybsa.cache import LayoutCache
from raybsa.kernels.api import block_sparse_attention
from raybsa.kernels.call import cast_inputs
from raybsa.kernels.eager import eagerly
from raybsa.layout import BlockLayout
from raybsa.spec import DENSE
from raybsa.variants.attend import attend
from raybsa.variants.hf_masks import Seen, is_causal_call, make_mask, seen_by
from raybsa.variants.hf_sequences import from_first, one_by_one
from raybsa.variants.hf_served import is_cross, place_of, watch_models
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
    "s_aux",
    "sinks",
    "softcap",
)


def register(
    source: LayoutSource | Sequence[LayoutSource] | nn.ModuleList,
    name: str = "raybsa",
    *,
    backend: str = "auto",
    cross_attention: str | None = None,
) -> None:
    """Makes ``attn_implementation=name`` an attention over the blocks that ``source`` keeps, masks included.

    From now on a model that is made with that name, or set to it, is looked at, and refused where a layer would not
    attend so (``raybsa.variants.hf_served``).

    Args:
        source: a ``FixedPattern``, or a learned ``BlockSelector``; or a sequence of them, one a layer (by the
            attention module's ``layer_idx``). Every model of that name uses this very object, so a learned one is a
            submodule of one model, which trains and saves it. Whether a fixed one is causal says the layer that calls.
        name: what models call it; an implementation of that name is replaced.
        backend: as in ``block_sparse_attention``.
        cross_attention: "dense" keeps all blocks between two sequences; None keeps what ``source`` does, which must
            be all: a rule over the blocks of one sequence does not say which of another's it means.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no source, or another word for ``cross_attention``.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("the adapter needs transformers: pip install 'raybsa[hf]'") from error
    if cross_attention not in (None, DENSE):
        raise ValueError(f"cross_attention must be None or {DENSE!r}, got {cross_attention!r}")
    by_layer = isinstance(source, Sequence | nn.ModuleList)
    sources: tuple[Any, ...] = tuple(source) if isinstance(source, Sequence | nn.ModuleList) else (source,)
    if not sources:
        raise ValueError("at least one source was wanted, got none")
    served = HFAttention(sources, by_layer=by_layer, backend=backend, dense_cross=cross_attention is not None)
    AttentionInterface.register(name, served)
    AttentionMaskInterface.register(name, make_mask)
    watch_models(name)


class HFAttention:
    """The function that a layer of a transformers model calls.

    A call with fewer queries than keys, as those that a KV cache makes, computes the last rows of the layout of the
    whole sequence up to there. A sequence of a padded batch attends as it would alone.
    """

    def __init__(
        self, sources: Sequence[LayoutSource], *, by_layer: bool, backend: str, dense_cross: bool = False
    ) -> None:
        self.sources = sources
        self.by_layer = by_layer
        self.backend = backend
        self.dense_cross = dense_cross
        self._rows: LayoutCache[BlockLayout] = LayoutCache()
        self._twins = {id(one): _twin(one) for one in sources if isinstance(one, FixedPattern)}
        self._everything = FixedPattern(DENSE)

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
        position_bias: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """(B, Sq, H, Dv) and no weights; 0 for queries that are padding.

        Args:
            module: the layer's attention; its ``layer_idx`` and ``is_causal`` are read.
            query: (B, H, Sq, D).
            key, value: (B, Hkv, Skv, D) and (B, Hkv, Skv, Dv), not repeated.
            attention_mask: what ``make_mask`` gave, or the whole mask, which broadcasts to (B, H, Sq, Skv): bool
                (True = attend) or added to the scores.
            dropout, scaling: as ``dropout_p`` and ``scale`` of ``block_sparse_attention``.
            is_causal: None is the module's.
            position_bias: (B or 1, H, Sq, Skv), added to the scores.

        Raises:
            NotImplementedError: the model asks for what is not served, ``NOT_SERVED`` among it.
            ValueError: what the mask allows, or the model's causality, is not what the source's layouts are for.
        """
        asked = [name for name in NOT_SERVED if others.get(name) is not None and others[name] is not False]
        if asked:
            raise NotImplementedError(
                f"{place_of(module)}: raybsa serves no {', '.join(asked)}; attn_implementation='eager' may"
            )
        given, (q_len, kv_len) = self._source(module), (query.shape[2], key.shape[2])
        seen = seen_by(attention_mask, kv_len)
        causal = self._is_causal(module, is_causal, seen, given, q_len, kv_len)
        seen = seen.with_keys().with_bias(None if position_bias is None else position_bias[..., :kv_len])
        cross = not causal and (q_len != kv_len or is_cross(module))
        source = self._for_cross(module, given) if cross else self._for(given, causal)
        options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
        q, k, v = cast_inputs(query, key, value)

        def attend_alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            if causal and q.shape[2] < k.shape[2]:
                return self._attend_last(source, q, k, v, mask, **options)
            return attend(source, q, k, v, attn_mask=mask, backend=self.backend, **options)

        if seen.keys is None or cross:
            return attend_alone(q, k, v, seen.as_mask()).transpose(1, 2).contiguous(), None
        if isinstance(source, FixedPattern):
            return eagerly(one_by_one, attend_alone, q, k, v, seen.whole, seen.keys), None
        if q_len < kv_len:
            raise _cannot_decode(q_len, kv_len)
        return from_first(attend_alone, q, k, v, seen.whole, seen.keys).contiguous(), None

    def _source(self, module: nn.Module) -> LayoutSource:
        if not self.by_layer:
            return self.sources[0]
        layer = getattr(module, "layer_idx", None)
        if layer is None or layer >= len(self.sources):
            raise ValueError(f"a source a layer was given, {len(self.sources)} in all, got a call of layer {layer}")
        return self.sources[layer]

    def _is_causal(
        self, module: nn.Module, asked: bool | None, seen: Seen, source: LayoutSource, q_len: int, kv_len: int
    ) -> bool:
        if seen.causal is not None:
            return seen.causal
        causal = getattr(module, "is_causal", None) if asked is None else asked
        return is_causal_call(seen.whole, q_len, kv_len, source_causal=source.causal, model_causal=causal)

    def _for(self, source: LayoutSource, causal: bool) -> LayoutSource:
        """The source as a causal one, or as one that is not."""
        if source.causal == causal:
            return source
        if id(source) not in self._twins:
            raise ValueError(f"the model's attention has causal={causal}, so must the source: got {source.causal}")
        return self._twins[id(source)]

    def _for_cross(self, module: nn.Module, source: LayoutSource) -> LayoutSource:
        """What keeps all blocks between two sequences, where that was asked for."""
        if self.dense_cross or (isinstance(source, FixedPattern) and _keeps_all(source)):
            return self._everything
        raise NotImplementedError(
            f"{place_of(module)}: attention within one sequence was wanted, got cross-attention, and {source} does not "
            "say which blocks of another sequence it keeps: register(..., cross_attention='dense') keeps all there"
        )

    def _attend_last(
        self, source: LayoutSource, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> Tensor:
        """(B, H, Sq, Dv): the last queries of a causal sequence, in whole blocks of rows."""
        layout, before = self._last_rows(source, q.shape[2], k.shape[2], q.shape[1], q.device)
        mask = mask if mask is None or mask.shape[-2] == 1 else F.pad(mask, (0, 0, before, 0))
        q = F.pad(q, (0, 0, before, 0))
        out: Any = block_sparse_attention(q, k, v, layout, attn_mask=mask, backend=self.backend, **options)
        return out[:, :, before:]

    def _last_rows(
        self, source: LayoutSource, queries: int, tokens: int, heads: int, device: torch.device
    ) -> tuple[BlockLayout, int]:
        """The rows, in whole blocks, that hold the last ``queries`` of ``tokens`` queries, and how many come before
        the first of these in its block."""
        if not isinstance(source, FixedPattern):
            raise _cannot_decode(queries, tokens)
        block, before = divmod(tokens - queries, source.block_size)

        def build() -> BlockLayout:
            whole = source.layout(tokens, tokens, heads, device)
            return whole.select(torch.arange(block, whole.num_q_blocks, device=device), None)

        return self._rows.get((id(source), block, tokens, heads, device), build), before


def _twin(source: FixedPattern) -> FixedPattern:
    """The same rule, causal where it is not and the other way round."""
    return FixedPattern(source.rule, density=source.density, block_size=source.block_size, causal=not source.causal)


def _keeps_all(source: FixedPattern) -> bool:
    return source.density == 1.0 if source.density is not None else source.rule.family == DENSE


def _cannot_decode(queries: int, tokens: int) -> NotImplementedError:
    return NotImplementedError(
        f"a learned source chooses by all {tokens} queries, got the last {queries} alone: generate with "
        "use_cache=False, or freeze it"
    )
