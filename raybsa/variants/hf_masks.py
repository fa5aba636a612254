"""What transformers says about who sees whom, as a mask of as few numbers as it needs; imported by ``hf`` alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_PADDING = -1  # in a whole mask of ours, int8: the column of a key that is padding; else 1 = attend, 0 = hidden


class Seen(NamedTuple):
    """Who sees whom in one call.

    Attributes:
        keys: (B, Skv) bool, True for the tokens that are no padding; None where all are, or where nothing is known.
        whole: broadcastable to (B, H, Sq, Skv), bool (True = attend) or added to the scores; None: all.
        causal: what the mask says of causality; None where it leaves that to the layer.
    """

    keys: Tensor | None = None
    whole: Tensor | None = None
    causal: bool | None = None


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    mask_function: Any,
    **others: Any,
) -> Tensor | None:
    """None or (B, Skv), the keys that count, where a model asks for causal attention (bool) or bidirectional (uint8)
    and no more; None leaves the choice of the two to the layer. (B, 1, Sq, Skv) for all else (packed sequences, sliding
    windows, prefixes): bool, True = attend; int8 where it also knows of padding. ``seen_by`` reads them.

    Called by transformers before the first layer, with the arguments of its mask functions (``sdpa_mask``).

    Raises:
        NotImplementedError: a cache whose keys do not begin at the first token and end at the last.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    query, key = int(q_offset), int(kv_offset)
    if key or (mask_function is not bidirectional_mask_function and query + q_length != kv_length):
        raise NotImplementedError(
            "a cache that holds all tokens so far and no more was wanted (DynamicCache without sliding layers), got "
            f"keys {key} to {key + kv_length} for queries {query} to {query + q_length}"
        )
    if attention_mask is not None and not torch.compiler.is_compiling() and bool(attention_mask.all()):
        attention_mask = None  # a compiled graph would end with a look at its numbers
    if mask_function is causal_mask_function:
        return _keys(attention_mask, batch_size, kv_length, torch.bool, others, "allow_is_causal_skip")
    if mask_function is bidirectional_mask_function:
        return _keys(attention_mask, batch_size, kv_length, torch.uint8, others, "allow_is_bidirectional_skip")
    whole = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=query,
        kv_offset=key,
        attention_mask=attention_mask,
        mask_function=mask_function,
        **others,
    )
    if whole is None or attention_mask is None:
        return whole
    return whole.to(torch.int8).masked_fill(~attention_mask.bool()[:, None, None, :kv_length], _PADDING)


def _keys(
    keys: Tensor | None, batch: int, kv_len: int, dtype: torch.dtype, asked: dict[str, Any], may_skip: str
) -> Tensor | None:
    if keys is not None:
        return keys[:, :kv_len].to(dtype)
    return None if asked.get(may_skip, True) else torch.ones(batch, kv_len, dtype=dtype, device=asked.get("device"))


def seen_by(mask: Tensor | None, kv_len: int) -> Seen:
    """What a mask says that a layer was handed: one of ``make_mask``, or the whole mask of the model's user.

    Raises:
        ValueError: it is not for these keys.
    """
    if mask is None:
        return Seen()
    if mask.dim() not in (2, 4) or mask.shape[-1] != kv_len:
        raise ValueError(f"a mask (B, {kv_len}) or (B, H, Sq, {kv_len}) was wanted, got {tuple(mask.shape)}")
    if mask.dim() == 2:
        return Seen(keys=_padded(mask.bool()), causal=mask.dtype == torch.bool)
    if mask.dtype == torch.int8:
        return Seen(keys=_padded((mask != _PADDING).any(2)[:, 0]), whole=mask > 0)
    return Seen(whole=mask)


def _padded(keys: Tensor) -> Tensor | None:
    """None where no token is padding, as far as one may look."""
    return None if not torch.compiler.is_compiling() and bool(keys.all()) else keys


def is_causal_call(whole: Tensor | None, q_len: int, kv_len: int, *, source_causal: bool, model_causal: bool) -> bool:
    """Whether the layout of a call is to be causal: where the model is, and no whole mask shows later keys.

    Raises:
        ValueError: such a mask, and a source that was given as causal; or a cache with room ahead. A compiled graph,
            which cannot look, raises RuntimeError when it runs.
    """
    if whole is None or not model_causal:
        return model_causal
    later = _shows_later(whole, q_len, kv_len)
    if source_causal or torch.compiler.is_compiling():
        _refuse(later, "a mask within causality was wanted, as the source is causal: got one that shows later keys")
    elif bool(later):
        return False
    if q_len < kv_len:
        _refuse(
            ~_allowed(whole)[..., -1, -1].any(),
            f"the last of {kv_len} keys must be the last query's own, got a mask that hides it: raybsa takes no "
            "cache with room ahead (StaticCache)",
        )
    return True


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


def _shows_later(mask: Tensor, q_len: int, kv_len: int) -> Tensor:
    """() bool: some query sees a key after its own, the last key being the last query's."""
    row = torch.arange(kv_len - q_len, kv_len, device=mask.device)[:, None]
    column = torch.arange(kv_len, device=mask.device)
    return (_allowed(mask) & (column > row)).any()


def _refuse(where: Tensor, message: str) -> None:
    """Raises ValueError where () bool says so; a compiled graph, which cannot look, RuntimeError when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(~where, message)
    elif bool(where):
        raise ValueError(message)
