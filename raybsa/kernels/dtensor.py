"""Attention over tensors that are spread over a mesh of devices (DTensor), by batch or by heads: each rank computes its
own samples and heads, and nothing travels. A sequence is spread by the ring (``raybsa.ring``), not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.kept import kept_with

Run = Callable[[AttentionCall], tuple[Any, Any]]


def run(call: AttentionCall, run_here: Run) -> tuple[Any, Any]:
    """out and lse (where ``run_here`` gives one), spread as q is.

    Args:
        run_here: runs this rank's part of the call.

    Raises:
        NotImplementedError: tensors that are not all spread alike by batch or heads, or dropout.
    """
    from torch.distributed.tensor import DTensor

    _check(call)
    q: Any = call.q
    mesh, placements, shape = q.device_mesh, q.placements, q.shape
    spans = _spans(q)
    local = replace(
        call,
        q=_local(call.q),
        k=_local(call.k),
        v=_local(call.v),
        attn_mask=None if call.attn_mask is None else _cut(_local(call.attn_mask), spans, shape),
        segment_ids=None if call.segment_ids is None else _cut_ids(call.segment_ids, spans),
        **_part_of_layout(call, spans),
    )
    out, lse = (
        None if part is None else DTensor.from_local(part, mesh, placements, run_check=False)
        for part in run_here(local)
    )
    return out, lse


def _check(call: AttentionCall) -> None:
    from torch.distributed.tensor import DTensor

    tensors: dict[str, Any] = {"q": call.q, "k": call.k, "v": call.v}
    plain = [name for name, x in tensors.items() if not isinstance(x, DTensor)]
    if plain:
        raise NotImplementedError(f"q, k and v must all be spread over one mesh, got {', '.join(plain)} that is not")
    spread = {name: (x.device_mesh, x.placements) for name, x in tensors.items()}
    by = all(p.is_replicate() or p.is_shard(0) or p.is_shard(1) for p in call.q.placements)  # type: ignore[attr-defined]
    if not by or len(set(spread.values())) > 1:
        told = {name: str(placements) for name, (_, placements) in spread.items()}
        raise NotImplementedError(
            f"q, k and v must be spread alike, by batch (Shard(0)), by heads (Shard(1)) or not at all, got {told}; "
            "a sequence is spread by BlockSparseDistributed"
        )
    if call.dropout_p:
        raise NotImplementedError("tensors spread over a mesh take no dropout: ranks would drop alike")


def _spans(x: Any) -> tuple[range, range]:
    """This rank's samples and heads."""
    found = [range(x.shape[0]), range(x.shape[1])]
    for dim, placement in enumerate(x.placements):
        if not placement.is_replicate():
            whole, devices = found[placement.dim], x.device_mesh.size(dim)
            if len(whole) % devices:
                what = ("samples", "heads")[placement.dim]
                raise NotImplementedError(f"{what} must be a multiple of the {devices} devices, got {len(whole)}")
            each = len(whole) // devices
            begin = x.device_mesh.get_local_rank(dim) * each
            found[placement.dim] = whole[begin : begin + each]
    return found[0], found[1]


def _local(x: Any) -> Tensor:
    """This rank's part; of a tensor that is no DTensor, all of it."""
    found: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return found


def _cut(mask: Tensor, spans: tuple[range, range], shape: torch.Size) -> Tensor:
    """This rank's part of a mask that broadcasts to (B, H, Sq, Skv)."""
    mask = mask[(None,) * (4 - mask.dim())]
    for dim, span in enumerate(spans):
        if mask.shape[dim] == shape[dim] != len(span):
            mask = mask.narrow(dim, span.start, len(span))
    return mask


def _cut_ids(ids: tuple[Tensor, Tensor], spans: tuple[range, range]) -> tuple[Tensor, Tensor]:
    of_queries, of_keys = (_local(x) for x in ids)
    samples = spans[0]
    if len(of_queries) == len(samples):
        return of_queries, of_keys
    return of_queries[samples.start : samples.stop], of_keys[samples.start : samples.stop]


def _part_of_layout(call: AttentionCall, spans: tuple[range, range]) -> dict[str, Any]:
    """The layout and block_bias of this rank's samples and heads."""
    layout, (samples, heads) = call.layout, spans
    batch, all_heads = call.q.shape[:2]
    bias = None if call.block_bias is None else _local(call.block_bias)
    per_sample = layout.num_groups == batch * all_heads and layout.num_groups != all_heads
    whole = len(heads) == all_heads and (len(samples) == batch or not per_sample)
    if layout.num_groups == 1 or whole:
        return {"layout": layout, "block_bias": bias}
    known, key = kept_with(layout), ("part", samples, heads)
    if key not in known:
        rows = [b * all_heads + h for b in samples for h in heads] if per_sample else list(heads)
        known[key] = layout.select_groups(torch.tensor(rows, device=layout.device))
    part, index = known[key]
    return {"layout": part, "block_bias": None if bias is None else bias.index_select(0, index)}
