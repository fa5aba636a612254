"""The arguments that every Triton kernel takes after its own tensors, from one checked call."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.triton_launch import Boxes
from raybsa.kernels.triton_tiles import Tile, padded_head_dim

LOG2E = 1.4426950408889634


class Softmax(NamedTuple):
    """What a backward knows of the softmax of its rows.

    lse (B, H, Sq) float32 contiguous, of all keys. Where ``out`` (B, H, Sq, D) is known, delta is made from it and
    from ``grad_lse`` (B, H, Sq).
    """

    lse: Tensor
    out: Tensor | None = None
    grad_lse: Tensor | None = None

    def signature(self, grad_out: Tensor) -> tuple[Any, ...]:
        """What the launches depend on, beyond the call's own signature."""
        tensors = (grad_out, self.lse, self.out, self.grad_lse)
        return tuple([None if t is None else (t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors])


def empty_gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for the gradient of x: laid out as x is in its own dtype, contiguous in another."""
    layout = torch.preserve_format if dtype == x.dtype else torch.contiguous_format
    return torch.empty_like(x, dtype=dtype, memory_format=layout)


def feature_tensors(call: AttentionCall) -> tuple[Tensor | None, ...]:
    """Global positions of the query and KV blocks where they are a selection, attn_mask, both segment_ids, the seed."""
    layout, mask = call.layout, call.attn_mask
    return (
        None if layout.q_block_ids is None else layout.q_block_starts,
        None if layout.kv_block_ids is None else layout.kv_block_starts,
        mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask,
        *(call.segment_ids or (None, None)),
        call.seed,
    )


def feature_strides(call: AttentionCall) -> tuple[int, ...]:
    """attn_mask's four strides, 0 where it broadcasts, and two of each of segment_ids."""
    mask, ids = call.attn_mask, call.segment_ids
    steps = [] if mask is None else [step if n > 1 else 0 for n, step in zip(mask.shape, mask.stride(), strict=True)]
    of_ids = (0, 0, 0, 0) if ids is None else (*ids[0].stride(), *ids[1].stride())
    return (*[0] * (4 - len(steps)), *steps, *of_ids)


class Numbers:
    """A launch's numbers: those of ``before``, the call's, those of ``after``.

    They are one tuple for as long as calls have the scale and the share of dropout of the last one.

    Args:
        after: None: what serves dropout, which only a kernel without an ``after`` has.
    """

    def __init__(self, before: tuple[int, ...], call: AttentionCall, after: tuple[int, ...] | None = None) -> None:
        self._before = (*before, call.q.shape[1], call.queries_per_kv, call.q.shape[2], call.k.shape[2])
        self._after = after
        self._last = (call.scale, call.dropout_p, self._made(call))

    def __call__(self, call: AttentionCall) -> tuple[int | float, ...]:
        scale, dropout_p, found = self._last
        if scale != call.scale or dropout_p != call.dropout_p:
            found = self._made(call)
            self._last = (call.scale, call.dropout_p, found)  # at once: threads share a launch
        return found

    def _made(self, call: AttentionCall) -> tuple[int | float, ...]:
        """heads, queries_per_kv, q_tokens, kv_tokens, scale in base 2, and dropout's threshold and factor."""
        after = _dropout_arguments(call.dropout_p) if self._after is None else self._after
        return (*self._before, call.scale * LOG2E, *after)


def constants(call: AttentionCall, tile: Tile, kept: Boxes, walked: Boxes) -> tuple[Any, ...]:
    """What the kernels are compiled for, beyond the types of their tensors, in the order of their signatures."""
    layout, head_dim = call.layout, call.q.shape[-1]
    return (
        layout.q_block_size,
        layout.kv_block_size,
        tile.rows,
        tile.cols,
        head_dim,
        padded_head_dim(head_dim),
        layout.causal,
        layout.q_tokens % layout.q_block_size != 0,
        layout.kv_tokens % layout.kv_block_size != 0,
        call.dropout_p > 0.0,
        dot_precision(call.q.dtype),
        bool(kept),
        bool(walked),
    )


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact float32 unless torch allows TF32 (``torch.set_float32_matmul_precision``)."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


@lru_cache(maxsize=1024)
def _dropout_arguments(p: float) -> tuple[int, float]:
    """The least 24-bit number that is kept, and ``1 / (1 - p)``."""
    return _threshold(p), 1.0 / (1.0 - p)


def _threshold(p: float) -> int:
    """The least k for which float32 ``k / 2**24 >= p``, by torch's own comparison."""
    near = max(0, math.floor(p * 2**24) - 2)
    drawn = torch.arange(near, near + 5, device="cpu").to(torch.float32) * 2.0**-24
    return near + int((drawn < p).sum())


def strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """All strides of (B, H, S, D) tensors, one after another, 0 for those that are not there."""
    return sum(((0, 0, 0, 0) if tensor is None else tensor.stride() for tensor in tensors), ())
