"""The inputs of ``nn.MultiheadAttention``: what must fit together, and its masks in the words of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def check_inputs(query: Tensor, key: Tensor, value: Tensor, widths: tuple[int, int, int], batch_dim: int) -> None:
    """Raises ValueError unless query, key and value are all (L, E) or all 3-D, of these widths, lengths and batch.

    Args:
        widths: features of query, key and value.
        batch_dim: where 3-D inputs hold their batch, 0 or 1.
    """
    if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            "query, key and value must be all unbatched (2-D) or all batched (3-D), "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    for name, tensor, width in zip(("query", "key", "value"), (query, key, value), widths, strict=True):
        if tensor.shape[-1] != width:
            raise ValueError(f"{name} must have {width} features in its last dimension, got {tuple(tensor.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key and value must agree in length and batch, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.dim() == 3 and query.shape[batch_dim] != key.shape[batch_dim]:
        raise ValueError(
            f"query and key must agree in their batch, dimension {batch_dim}, "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )


def translate_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """``attn_mask`` and ``segment_ids`` as ``block_sparse_attention`` takes them.

    A boolean key_padding_mask becomes segments and a float one (B, 1, 1, Skv), so that neither grows with Sq; a float
    one beside an attn_mask of your own has to be added to it.

    Args:
        attn_mask: (Sq, Skv) or (B * H, Sq, Skv); bool (True = may NOT attend) or added to the scores.
        key_padding_mask: (B, Skv), or (Skv,) where B is 1; bool (True = ignore this key) or added to its scores.
        q, k: (B, H, Sq, D) and (B, H, Skv, D).

    Raises:
        TypeError, ValueError: a mask of another type or shape.
    """
    _check_mask("attn_mask", attn_mask, [(q.shape[2], k.shape[2]), (q.shape[0] * q.shape[1], q.shape[2], k.shape[2])])
    padding_shapes: list[tuple[int, ...]] = [(k.shape[0], k.shape[2])]
    _check_mask("key_padding_mask", key_padding_mask, padding_shapes + [(k.shape[2],)] * (k.shape[0] == 1))
    mask = None if attn_mask is None else _four_dims(attn_mask, q.shape[0])
    if key_padding_mask is None:
        return mask, None
    padding = key_padding_mask.view(k.shape[0], k.shape[2])
    if padding.dtype == torch.bool:
        return mask, (padding.new_zeros(q.shape[0], q.shape[2], dtype=torch.int32), padding.int())
    padding = padding[:, None, None, :]
    return padding if mask is None else _additive(mask, padding.dtype) + padding, None


def _four_dims(mask: Tensor, batch: int) -> Tensor:
    """(1, 1, Sq, Skv) or (B, H, Sq, Skv); a boolean mask turned to True = attend."""
    mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, -1))
    return ~mask if mask.dtype == torch.bool else mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _check_mask(name: str, mask: Tensor | None, shapes: list[tuple[int, ...]]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating point, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
