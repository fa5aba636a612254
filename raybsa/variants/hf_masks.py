"""What transformers says about who sees whom, as a mask of as few numbers as it needs; imported by ``hf`` alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# What the type of a mask (B, Skv) of ours says: whether the call is causal, and whether some token may be padding.
_KINDS = {
    torch.int16: (True, True),
    torch.uint8: (False, True),
    torch.int64: (True, False),
    torch.int32: (False, False),
}
_HIDDEN = -1e4  # what is added to a score and hides its key, or less: models write it themselves
_PADDING = -1  # in a whole mask of ours, int8: the column of a key that is padding; else 1 = attend, 0 = hidden


class Told(Tensor):
    """A mask of ours, which says what no mask of transformers does: ``seen_by`` reads it, no model by itself."""

    _MAY = frozenset(("__get__", "__set__", "dim", "size", "to", "detach", "is_floating_point", "contiguous", "numel"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in cls._MAY:
            raise NotImplementedError(
                "a model that hands its mask on to attention layers was wanted, got one that itself reads it "
                f"({name}), and raybsa's says other things; load it with attn_implementation='eager'"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


def _told(mask: Tensor) -> Tensor:
    return mask if torch.compiler.is_compiling() else mask.as_subclass(Told)


def _untold(mask: Tensor | None) -> Tensor | None:
    if not isinstance(mask, Told):
        return mask
    with torch._C.DisableTorchFunctionSubclass():
        return mask.as_subclass(Tensor)


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

    def with_keys(self) -> Seen:
        """With a whole mask that only hides keys, the same from every query, as the keys that it does not hide."""
        if self.whole is None or self.whole.shape[1:3] != (1, 1) or torch.compiler.is_compiling():
            return self
        hides = ~_allowed(self.whole)
        plain = self.whole.dtype == torch.bool or not bool(self.whole[~hides].any())
        return self._replace(whole=None, keys=_padded(~hides[:, 0, 0])) if plain else self

    def with_bias(self, bias: Tensor | None) -> Seen:
        """With a bias (B or 1, H, Sq, Skv) that is added to the scores, as T5's of positions."""
        if bias is None:
            return self
        bias = bias if self.whole is None else _both(self.whole, bias)
        return self._replace(whole=bias)

    def as_mask(self) -> Tensor | None:
        """``attn_mask`` of a call that counts padded tokens as others are, and hides them."""
        if self.keys is None:
            return self.whole
        keys = self.keys[:, None, None, :]
        return keys if self.whole is None else _both(keys, self.whole)


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
    """(B, Skv), the keys that count, where a model asks for causal or bidirectional attention and no more; its type
    says which (``_KINDS``), as a layer's own word for that may be another. (B, 1, Sq, Skv) for all else (packed
    sequences, sliding windows, prefixes): bool, True = attend; int8 where it also knows of padding. ``seen_by`` reads
    them.

    Called by transformers before the first layer, with the arguments of its mask functions (``sdpa_mask``).

    Raises:
        NotImplementedError: a cache whose keys do not begin at the first token and end at the last; padding, and a
            model that itself reads the mask.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    query, key = int(q_offset), int(kv_offset)
    if key or (mask_function is not bidirectional_mask_function and query + q_length != kv_length):
        raise NotImplementedError(
            "a cache that holds all tokens so far and no more was wanted (DynamicCache without sliding layers), got "
            f"keys {key} to {key + kv_length} for queries {query} to {query + q_length}"
        )
    attention_mask = _untold(attention_mask)
    if attention_mask is not None and not torch.compiler.is_compiling() and bool(attention_mask.all()):
        attention_mask = None  # a compiled graph would end with a look at its numbers
    plain = {causal_mask_function: True, bidirectional_mask_function: False}.get(mask_function)
    causal, bidirectional = (others.get(f"allow_is_{kind}_skip", True) for kind in ("causal", "bidirectional"))
    reads_it = plain is not None and not (causal if plain else bidirectional)
    if plain is not None and not reads_it:
        return _keys(attention_mask, (batch_size, kv_length), plain, others["device"])
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
    if whole is None:
        return _keys(None, (batch_size, kv_length), causal, others["device"])
    if attention_mask is None:
        return whole
    if reads_it:
        raise NotImplementedError(
            "a batch without padding was wanted, as this model itself reads the mask, in which raybsa says what is "
            "padding, got one with padding"
        )
    return _told(whole.to(torch.int8).masked_fill(~attention_mask.bool()[:, None, None, :kv_length], _PADDING))


def _keys(keys: Tensor | None, shape: tuple[int, int], causal: bool, device: torch.device) -> Tensor:
    kind = next(dtype for dtype, known in _KINDS.items() if known == (causal, keys is not None))
    if keys is None:
        return _told(torch.ones((), dtype=kind, device=device).expand(shape))
    return _told(keys[:, : shape[1]].to(kind))


def seen_by(mask: Tensor | None, kv_len: int) -> Seen:
    """What a mask says that a layer was handed: one of ``make_mask``, or the whole mask of the model's user.

    Raises:
        ValueError: it is not for these keys.
    """
    mask = _untold(mask)
    if mask is None:
        return Seen()
    if mask.dim() not in (2, 4) or mask.shape[-1] != kv_len:
        raise ValueError(f"a mask (B, {kv_len}) or (B, H, Sq, {kv_len}) was wanted, got {tuple(mask.shape)}")
    if mask.dim() == 2:
        causal, padded = _KINDS.get(mask.dtype, (None, True))
        return Seen(keys=_padded(mask.bool()) if padded else None, causal=causal)
    if mask.dtype == torch.int8:
        return Seen(keys=_padded((mask != _PADDING).any(2)[:, 0]), whole=mask > 0)
    return Seen(whole=mask)


def _padded(keys: Tensor) -> Tensor | None:
    """None where no token is padding, as far as one may look."""
    return None if not torch.compiler.is_compiling() and bool(keys.all()) else keys


def is_causal_call(
    whole: Tensor | None, q_len: int, kv_len: int, *, source_causal: bool, model_causal: bool | None
) -> bool:
    """Whether the layout of a call is to be causal: where the layer is, and no whole mask shows later keys.

    ``model_causal`` None: the layer does not say; it is causal where no mask shows later keys.

    Raises:
        ValueError: such a mask, of a layer that says it is causal, and a source that was given as causal; or a cache
            with room ahead. A compiled graph, which cannot look, raises RuntimeError when it runs.
    """
    if whole is None or model_causal is False:
        return model_causal is not False
    if model_causal is None and whole.shape[-2] < q_len:
        return False
    later = _shows_later(whole, q_len, kv_len)
    if torch.compiler.is_compiling() or (source_causal and model_causal):
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


def _both(mask: Tensor, other: Tensor) -> Tensor:
    """What both of two masks say, each bool or added to the scores."""
    if other.dtype == torch.bool:
        return mask & other if mask.dtype == torch.bool else torch.where(other, mask, -torch.inf)
    return torch.where(mask, other, -torch.inf) if mask.dtype == torch.bool else mask + other


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > max(torch.finfo(mask.dtype).min, _HIDDEN)


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
