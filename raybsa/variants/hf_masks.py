"""What transformers says about who sees whom, as a mask of as few numbers as it needs; imported by ``hf`` alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_mask(
    source_causal: bool,
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    mask_function: Any,
    **others: Any,
) -> Tensor | None:
    """None or (B, Skv), the keys that count, where a model asks for causal or bidirectional attention and no more;
    (B, 1, Sq, Skv) for all else (packed sequences, sliding windows, prefixes). bool, True = attend.

    Called by transformers before the first layer, with the arguments of its mask functions (``sdpa_mask``).

    Raises:
        ValueError: the model asks for causal attention, and the sources are not; or the other way round.
        NotImplementedError: a cache whose keys do not begin at the first token and end at the last.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    query, key = int(q_offset), int(kv_offset)
    if key or (source_causal and query + q_length != kv_length):
        raise NotImplementedError(
            "a cache that holds all tokens so far and no more was wanted (DynamicCache without sliding layers), got "
            f"keys {key} to {key + kv_length} for queries {query} to {query + q_length}"
        )
    plain = {causal_mask_function: True, bidirectional_mask_function: False}
    if mask_function not in plain:
        return sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            q_offset=query,
            kv_offset=key,
            attention_mask=attention_mask,
            mask_function=mask_function,
            **others,
        )
    _check_causality(source_causal, plain[mask_function])
    if attention_mask is None or torch.compiler.is_compiling():  # a look at its numbers would end the graph
        return attention_mask
    return None if bool(attention_mask.all()) else attention_mask


def check_mask(
    mask: Tensor | None, q_len: int, kv_len: int, *, source_causal: bool, model_causal: bool
) -> Tensor | None:
    """The mask as ``block_sparse_attention`` takes it, broadcastable to (B, H, Sq, Skv).

    Args:
        mask: None or (B, Skv): the model's causality holds beside it. Four dimensions: it holds all there is to say.

    Raises:
        ValueError: it allows what a causal source does not, or is not for these keys.
    """
    if mask is None or mask.dim() == 2:
        _check_causality(source_causal, model_causal)
    if mask is None:
        return None
    if mask.dim() not in (2, 4) or mask.shape[-1] != kv_len:
        raise ValueError(f"a mask (B, {kv_len}) or (B, H, Sq, {kv_len}) was wanted, got {tuple(mask.shape)}")
    if mask.dim() == 2:
        return mask.bool()[:, None, None, :]
    if source_causal:
        _check_nothing_later(mask, q_len, kv_len)
    return mask


def _check_causality(source_causal: bool, model_causal: bool) -> None:
    if source_causal != model_causal:
        raise ValueError(f"the model's attention has causal={model_causal}, so must the source: got {source_causal}")


def _check_nothing_later(mask: Tensor, q_len: int, kv_len: int) -> None:
    """Of a whole mask: no query sees a later key, and the last key belongs to the last query."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    row = torch.arange(kv_len - q_len, kv_len, device=mask.device)[:, None]
    column = torch.arange(kv_len, device=mask.device)
    _refuse(
        (allowed & (column > row)).any(),
        "a mask within causality was wanted, as the source is causal: got one that shows later keys",
    )
    if q_len < kv_len:
        _refuse(
            ~allowed[..., -1, -1].any(),
            f"the last of {kv_len} keys must be the last query's own, got a mask that hides it: raybsa takes no "
            "cache with room ahead (StaticCache)",
        )


def _refuse(where: Tensor, message: str) -> None:
    """Raises ValueError where () bool says so; a compiled graph, which cannot look, RuntimeError when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(~where, message)
    elif bool(where):
        raise ValueError(message)
