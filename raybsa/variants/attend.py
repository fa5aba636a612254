"""The path of a variant's call: its source selects blocks, a backend attends over them, the source completes it."""

from __future__ import annotations

from torch import Tensor

from raybsa.kernels.api import make_call, run_call
from raybsa.kernels.call import cast_inputs
from raybsa.kernels.widths import nothing_to_attend
from raybsa.variants.source import LayoutSource


def attend(
    source: LayoutSource,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """(B, H, Sq, D) in q's dtype; arguments as in ``block_sparse_attention``, over the blocks that ``source`` keeps."""
    q, k, v = cast_inputs(q, k, v)
    if not (q.numel() and k.numel()):
        nothing = nothing_to_attend(q, k, v)
        if nothing is not None:
            return nothing[0]
    selection = source.select(q, k, attn_mask, segment_ids)
    mask = attn_mask if selection.attn_mask is None else selection.attn_mask
    rest = (scale, mask, segment_ids, selection.block_bias, dropout_p)
    call = make_call(q, k, v, selection.layout, *rest)
    return source.complete(selection, call, run_call(call, backend)[0])
