"""FlexAttention (torch.nn.attention.flex_attention) as a backend, for the calls it can serve.

FlexAttention wants a list as wide as all KV blocks for every row, four times over (partial and full blocks, forward and
transposed): num_blocks x num_blocks numbers a head. The adapter makes them from the layout without a dense mask, and
refuses where they would pass ``LIST_BYTES``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from raybsa.kernels import cpp_build, flex_tiles
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.kept import kept_with
from raybsa.layout import BlockLayout

LIST_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}


def why_not(call: AttentionCall) -> str | None:
    """Why FlexAttention cannot serve this call; None where it can."""
    if call.extra is not None:
        return f"this FlexAttention adapter takes no {call.extra}"
    layout, head_dim = call.layout, call.q.shape[-1]
    if layout.q_block_ids is not None or layout.kv_block_ids is not None:
        return "this FlexAttention adapter takes no selected layouts"
    if call.q.dtype == torch.float64:
        return "FlexAttention has no float64"
    if head_dim < 16:
        return f"FlexAttention wants head_dim >= 16, got {head_dim}"
    if min(layout.q_block_size, layout.kv_block_size) < 16:
        return f"FlexAttention wants blocks of 16 or more, got {layout.q_block_size} x {layout.kv_block_size}"
    kind = call.q.device.type
    if kind not in LIST_BYTES:
        return f"this FlexAttention adapter runs on cpu and cuda, not on {kind}"
    list_bytes = 4 * 4 * layout.num_groups * layout.num_q_blocks * layout.num_kv_blocks
    if list_bytes > LIST_BYTES[kind]:
        return f"FlexAttention's block lists would take {list_bytes >> 20} MB here, more than {LIST_BYTES[kind] >> 20}"
    return _why_not_on_cpu(call) if kind == "cpu" else _why_not_on_cuda(call)


def _why_not_on_cpu(call: AttentionCall) -> str | None:
    if call.needs_grad:
        return "FlexAttention has no backward on the CPU"
    if call.return_lse:
        return "FlexAttention returns no lse on the CPU"
    missing = cpp_build.why_no_compiler(alone=True)
    return None if missing is None else f"FlexAttention on the CPU {missing}"


def _why_not_on_cuda(call: AttentionCall) -> str | None:
    sizes = (call.layout.q_block_size, call.layout.kv_block_size)
    tile = flex_tiles.SMALL
    if call.needs_grad and any(size % tile for size in sizes):
        return f"FlexAttention's backward wants blocks that are multiples of {tile}, got {sizes[0]} x {sizes[1]}"
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """out (B, H, Sq, D), and lse (B, H, Sq) float32 if the call wants it."""
    from torch.nn.attention.flex_attention import AuxRequest

    on_cuda = call.q.device.type == "cuda"
    if on_cuda:
        flex_tiles.prepare(call.layout)
    result = attend(
        call.q,
        call.k,
        call.v,
        block_mask=_block_mask(call),
        scale=call.scale,
        enable_gqa=call.queries_per_kv > 1,
        return_aux=AuxRequest(lse=True) if call.return_lse else None,
        kernel_options=flex_tiles.forward_options(call.layout) if on_cuda else {},
    )
    return (result[0], result[1].lse) if call.return_lse else (result, None)


def attend(*tensors: Tensor, **options: Any) -> Any:
    """FlexAttention, compiled, with its own arguments. torch's limit of compiled variants is lifted where it is hit:
    the switch takes about 70 us."""
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    try:
        return _compiled()(*tensors, **options)
    except FailOnRecompileLimitHit:
        with config.patch(recompile_limit=1024):
            return _compiled()(*tensors, **options)


@cache
def _compiled() -> Any:
    """Compiled whole: past the recompile limit a full graph raises, where a partial one would go dense in eager."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _causal(batch: Tensor, head: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
    return kv_index <= q_index


def _block_mask(call: AttentionCall) -> Any:
    batch, heads = call.q.shape[:2]
    masks, key = kept_with(call.layout), ("flex", batch, heads)
    if key not in masks:
        masks[key] = _make_block_mask(call.layout, batch, heads)
    return masks[key]


def _make_block_mask(layout: BlockLayout, batch: int, heads: int) -> Any:
    from torch.nn.attention.flex_attention import BlockMask, noop_mask

    groups = {1: (1, 1), heads: (1, heads)}.get(layout.num_groups, (batch, heads))
    cut = layout.crosses_diagonal()
    group, row, col = layout.coordinates()
    lists: dict[str, Any] = {}
    for name in ("kv", "full_kv", "q", "full_q"):
        kept = ~cut if name.startswith("full") else cut
        major, minor, *shape = (row, col, layout.num_q_blocks, layout.num_kv_blocks)
        if name.endswith("q"):
            major, minor, *shape = (col, row, layout.num_kv_blocks, layout.num_q_blocks)
        counts, indices = _lists(group[kept], major[kept], minor[kept], groups, *shape)
        lists |= {f"{name}_num_blocks": counts, f"{name}_indices": indices}
    return BlockMask(
        seq_lengths=(layout.q_len, layout.kv_len),
        BLOCK_SIZE=(layout.q_block_size, layout.kv_block_size),
        mask_mod=_causal if layout.causal else noop_mask,
        **lists,
    )


def _lists(
    group: Tensor, major: Tensor, minor: Tensor, groups: tuple[int, int], size: int, width: int
) -> tuple[Tensor, Tensor]:
    """FlexAttention's counts (B, H, size) and indices (B, H, size, width), int32, from block coordinates."""
    flat = group * size + major
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=groups[0] * groups[1] * size)
    place = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[flat[order]]
    indices = torch.zeros(len(counts), width, dtype=torch.int32, device=flat.device)
    indices[flat[order], place] = minor[order].to(torch.int32)
    return counts.to(torch.int32).view(*groups, size), indices.view(*groups, size, width)
