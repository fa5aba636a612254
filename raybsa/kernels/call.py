"""AttentionCall: the checked arguments of one ``block_sparse_attention``, as every backend receives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor

from raybsa.kernels.kept import kept_with, kept_with_rows
from raybsa.layout import BlockLayout

ALIGNMENT = 128  # bytes: what any kernel here may assume of a tensor's address
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(eq=False)  # frozen would take as long to make as a kernel to launch
class AttentionCall:
    """One call whose arguments fit together; never changed once it is made.

    q is (B, H, Sq, D), k and v are (B, Hkv, Skv, D); the rest is as ``block_sparse_attention`` documents it, with
    ``scale``, ``seed`` and ``deterministic`` decided. Sq and Skv are the layout's tokens at hand. ``seed`` is () int64
    on q's device, None where nothing is dropped.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout
    scale: float
    attn_mask: Tensor | None
    segment_ids: tuple[Tensor, Tensor] | None
    block_bias: Tensor | None
    dropout_p: float
    seed: Tensor | None
    deterministic: bool
    return_lse: bool

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def signature(self) -> int:
        """A number for all that decides how the call runs, but for its numbers (those in its tensors, scale, share of
        dropout, seed) and its layout.

        Calls of equal signature that share a layout pass the same checks and run the same kernels.
        """
        tensors = (self.q, self.k, self.v, self.attn_mask, *(self.segment_ids or ()), self.block_bias)
        of_tensors = tuple([None if t is None else _signature(t) for t in tensors])
        of_mask = self.attn_mask is not None and self.attn_mask.requires_grad
        grads = (self.needs_grad, of_mask)
        of_numbers = (self.scale > 0, self.scale < 0, self.dropout_p > 0)
        return _number_of((*of_tensors, *grads, *of_numbers, self.deterministic, self.return_lse))

    @property
    def extra(self) -> str | None:
        """What the call asks for beyond plain attention, which most backends of other makers lack: the first such
        argument; None where it asks for nothing."""
        given = {
            "attn_mask": self.attn_mask is not None,
            "segment_ids": self.segment_ids is not None,
            "block_bias": self.block_bias is not None,
            "dropout": self.dropout_p > 0,
        }
        return next((name for name, there in given.items() if there), None)

    @property
    def needs_grad(self) -> bool:
        tensors = (self.q, self.k, self.v, self.attn_mask, self.block_bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_SIGNATURES: dict[tuple[Any, ...], int] = {}
_MOST_SIGNATURES = 4096
_NUMBERS = count()


def _number_of(known: tuple[Any, ...]) -> int:
    found = _SIGNATURES.get(known)
    if found is None:
        if len(_SIGNATURES) >= _MOST_SIGNATURES:
            _SIGNATURES.clear()  # numbers go on: what was decided by an old one is decided once more
        found = _SIGNATURES.setdefault(known, next(_NUMBERS))
    return found


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % ALIGNMENT


def decided(call: AttentionCall, key: tuple[object, ...], decide: Callable[[], Any]) -> Any:
    """What ``decide`` gave for the first call of this signature and layout; ``key`` tells decisions apart."""
    layout = call.layout
    if not isinstance(layout, BlockLayout):
        return decide()  # its check says what is wrong
    if layout.transient:
        layout.checked()
    known = kept_with_rows(layout) if layout.transient else kept_with(layout)
    key = (*key, call.signature)
    found = known.get(key)
    if found is None:
        found = known[key] = decide()
    return found


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores, softmax and lse are float64 for float64 inputs and float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, checked to be 4-D tensors and cast as autocast asks."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            came = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a tensor (batch, heads, tokens, head_dim), got {came}")
    if q.is_nested:
        raise TypeError("q, k and v must be padded, with the padding hidden by segment_ids: got nested tensors")
    kind = q.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    cast = [x.to(dtype) if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x for x in (q, k, v)]
    return cast[0], cast[1], cast[2]


def check_numbers(scale: Any, dropout_p: float, segment_ids: Any) -> None:
    """Raises TypeError or ValueError for what would not even make a call."""
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got a tensor, which it would give no gradient: multiply q by it")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    pair = isinstance(segment_ids, tuple | list) and len(segment_ids) == 2
    if segment_ids is not None and not (pair and all(isinstance(ids, Tensor) for ids in segment_ids)):
        came = f"{len(segment_ids)} of them" if isinstance(segment_ids, tuple | list) else type(segment_ids).__name__
        raise TypeError(f"segment_ids must be a pair of tensors, of the queries and of the keys, got {came}")


def check_call(call: AttentionCall) -> None:
    """Raises TypeError or ValueError that names what was wanted and what came."""
    _check_types(call)
    _check_shapes(call)
    _check_masks(call)
    call.layout.checked()


def _check_types(call: AttentionCall) -> None:
    for name, tensor in (("q", call.q), ("k", call.k), ("v", call.v)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be one of {[str(d) for d in DTYPES]}, got {tensor.dtype}")
        if tensor.dtype != call.q.dtype or tensor.device != call.q.device:
            raise ValueError(
                f"q, k and v must share dtype and device, got {call.q.dtype} on {call.q.device} "
                f"and {name} {tensor.dtype} on {tensor.device}"
            )
    if not isinstance(call.layout, BlockLayout):
        raise TypeError(f"layout must be a BlockLayout, got {type(call.layout).__name__}")
    if call.layout.device != call.q.device:
        raise ValueError(f"the layout is on {call.layout.device}, q on {call.q.device}: use layout.to(q.device)")


def _check_shapes(call: AttentionCall) -> None:
    (batch, heads, q_tokens, head_dim), layout = call.q.shape, call.layout
    kv_heads = call.k.shape[1]
    if call.k.shape != (batch, kv_heads, call.k.shape[2], head_dim) or call.v.shape != call.k.shape:
        raise ValueError(
            f"k must be ({batch}, kv_heads, kv_tokens, {head_dim}) to fit q {tuple(call.q.shape)}, and v as k but for "
            f"its head_dim, got {tuple(call.k.shape)} and {tuple(call.v.shape)}"
        )
    if kv_heads < 1 or heads % kv_heads or not batch or not head_dim:
        raise ValueError(
            f"q's heads must be a multiple of the KV heads and no size may be 0, got q {tuple(call.q.shape)}, "
            f"k {tuple(call.k.shape)}"
        )
    if (layout.q_tokens, layout.kv_tokens) != (q_tokens, call.k.shape[2]):
        raise ValueError(
            f"the layout is for {layout.q_tokens} query and {layout.kv_tokens} key tokens, "
            f"got q with {q_tokens} and k with {call.k.shape[2]}"
        )
    if layout.num_groups not in (1, heads, batch * heads):
        raise ValueError(
            f"the layout must have 1, {heads} (heads) or {batch * heads} (batch * heads) groups, "
            f"got {layout.num_groups}; a layout per KV head becomes one per head by layout.repeat_heads"
        )


def _check_masks(call: AttentionCall) -> None:
    batch, heads, q_tokens, _ = call.q.shape
    kv_tokens, mask, bias = call.k.shape[2], call.attn_mask, call.block_bias
    if mask is not None:
        full = (batch, heads, q_tokens, kv_tokens)
        fits = mask.dim() <= 4 and all(
            have in (1, want) for have, want in zip(mask.shape[::-1], full[::-1], strict=False)
        )
        if not fits:
            raise ValueError(f"attn_mask must broadcast to {full}, got {tuple(mask.shape)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"attn_mask must be bool (True = attend) or floating point, got {mask.dtype}")
        if mask.device != call.q.device:
            raise ValueError(f"attn_mask is on {mask.device}, q on {call.q.device}")
    if bias is not None and (bias.shape != (call.layout.nnz_blocks,) or bias.device != call.q.device):
        raise ValueError(
            f"block_bias must be ({call.layout.nnz_blocks},) on {call.q.device}, one a kept block, "
            f"got {tuple(bias.shape)} on {bias.device}"
        )
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"block_bias must be floating point, got {bias.dtype}")
    if call.segment_ids is not None:
        for name, ids, tokens in zip(("query", "key"), call.segment_ids, (q_tokens, kv_tokens), strict=True):
            if ids.shape != (batch, tokens) or ids.is_floating_point() or ids.device != call.q.device:
                raise ValueError(
                    f"segment_ids must be a pair of int tensors ({batch}, {q_tokens}) and ({batch}, {kv_tokens}) "
                    f"on {call.q.device}, got {ids.dtype} {tuple(ids.shape)} on {ids.device} for the {name} side"
                )
