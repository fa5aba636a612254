"""The tensors of a case: numbers by its seed, in memory as it says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raybsa import BlockLayout
from tests.fuzzing.case import Case

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min


def dtype_of(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _generator(case: Case, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(case.seed * 31 + number)


def normal(case: Case, shape: tuple[int, ...], number: int) -> Tensor:
    """Standard normal float64 on the CPU."""
    return torch.randn(shape, generator=_generator(case, number), dtype=torch.float64)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _sliced(x: Tensor) -> Tensor:
    """Every second number of a wider tensor of garbage."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.0)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def _expanded(x: Tensor) -> Tensor:
    """One head for all: its stride is zero."""
    return x[:, :1].expand_as(x) if x.shape[1] else x


def _reversed_dims(x: Tensor) -> Tensor:
    return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def _packed(x: Tensor) -> Tensor:
    """A third of a projection of q, k and v together."""
    batch, heads, tokens, width = x.shape
    whole = x.new_full((batch, tokens, 3, heads, width), 7.0)
    whole[:, :, 1] = x.transpose(1, 2)
    return whole[:, :, 1].transpose(1, 2)


def _offset(x: Tensor) -> Tensor:
    """One number after an aligned address."""
    flat = x.new_empty(x.numel() + 1)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "tokens_first": _tokens_first,
    "sliced": _sliced,
    "expanded": _expanded,
    "reversed_dims": _reversed_dims,
    "packed": _packed,
    "offset": _offset,
}


def tensors(case: Case, layout: BlockLayout) -> dict[str, Tensor]:
    """q, k, v, and where the case has them m (attn_mask) and b (block_bias), without gradients."""
    dtype, lay_out = dtype_of(case.dtype), LAID_OUT[case.strides]
    shapes = {
        "q": (case.batch, case.heads, case.q_len, case.head_dim),
        "k": (case.batch, case.kv_heads, case.kv_len, case.head_dim),
        "v": (case.batch, case.kv_heads, case.kv_len, case.v_dim),
    }
    found = {}
    for number, (name, shape) in enumerate(shapes.items()):
        x = normal(case, shape, number)
        found[name] = lay_out((x * (case.magnitude if name != "v" else 1.0)).to(case.device, dtype))
    if case.mask != "none":
        found["m"] = mask(case)
    if case.bias:
        bias = normal(case, (layout.nnz_blocks,), 4)
        found["b"] = bias.to(case.device, dtype if case.bias_dtype == "same" else dtype_of(case.bias_dtype))
    shared = {"kv": ("v",), "qkv": ("k", "v")}.get(case.shared, ())
    return {name: x for name, x in found.items() if name not in shared}


def mask(case: Case) -> Tensor:
    """attn_mask of the case's shape, kind and type."""
    full = (case.batch, case.heads, case.q_len, case.kv_len)[4 - len(case.mask_shape) :] if case.mask_shape else ()
    shape = [size if kept == "1" else 1 for size, kept in zip(full, case.mask_shape, strict=True)]
    shows = (torch.rand(shape, generator=_generator(case, 5)) < 0.7).to(case.device)
    found = shows if case.mask == "bool" else _added(case, shows)
    if case.mask_strides == "expanded":
        found = found.expand(full)
    elif case.mask_strides == "transposed" and found.dim() > 1:
        found = found.transpose(-1, -2).contiguous().transpose(-1, -2)
    return found


def _added(case: Case, shows: Tensor) -> Tensor:
    dtype = dtype_of(case.dtype if case.mask_dtype == "same" else case.mask_dtype)
    x = normal(case, tuple(shows.shape), 6).to(case.device, dtype)
    hidden = {"infinite": -INF, "lowest": max(torch.finfo(dtype).min, LOWEST if case.dtype != "float64" else -INF)}.get(
        case.mask
    )
    return x if hidden is None else x.masked_fill(~shows, hidden)


def segment_ids(case: Case) -> tuple[Tensor, Tensor] | None:
    if not case.segments:
        return None
    ids = [
        torch.randint(0, case.segments, (case.batch, n), generator=_generator(case, 7 + i)).sort(1).values
        for i, n in enumerate((case.q_len, case.kv_len))
    ]
    if case.seed % 2:
        ids = [x.flip(1) for x in ids]
    if case.seed % 5 == 0 and case.segment_dtype.startswith("int"):
        ids = [x - 2 for x in ids]
    return ids[0].to(case.device, dtype_of(case.segment_dtype)), ids[1].to(case.device, dtype_of(case.segment_dtype))


def gradient_for(like: Tensor, number: int) -> Tensor:
    """A gradient for output ``number``: numbers that every type can hold, made without a generator, which a trace or
    vmap would see."""
    flat = torch.cos(torch.arange(like.numel(), dtype=torch.float64) * 1.7 + number + 0.3)
    return flat.bfloat16().view(like.shape).to(like.device, like.dtype)


def other_numbers(case: Case, x: Tensor) -> Tensor:
    """A tensor as ``x`` lies, of other numbers: what a trace is made of."""
    if not x.is_floating_point():
        return x.flip(0) if x.dim() else x
    other = normal(case, tuple(x.shape), 30).to(x.device, x.dtype)
    return LAID_OUT[case.strides](other) if x.dim() == 4 and not x.is_contiguous() else other
