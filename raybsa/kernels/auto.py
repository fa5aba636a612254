"""What ``backend="auto"`` takes: the order in which backends were fastest on the measured cell nearest to a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import log

import torch

from raybsa.kernels.auto_table import Measured, of_device, table
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.kept import kept_with
from raybsa.kernels.peers.guards import why_not_plain
from raybsa.layout import BlockLayout

REACH = 4.0  # a cell says nothing about calls with more than this many times its tokens, heads or density, or less


def measured_order(call: AttentionCall) -> tuple[str, ...]:
    """Backends, the fastest first; empty where nothing like this call was measured (see ``nearest``), and for a layout
    that serves one call: a library's own form of it would be made for nothing else."""
    rows = _device_rows(call.q.device)
    if not rows or call.layout.transient or not _is_measured_kind(call):
        return ()
    found = nearest(rows, call)
    return found.order if found else ()


def nearest(rows: Sequence[Measured], call: AttentionCall) -> Measured | None:
    """The cell of the call's dtype, head_dim, block size and pass that lies nearest; None where all are too far.

    Near means the least sum of absolute logarithms of the ratios of tokens, heads, density and skews.
    """
    (batch, heads, tokens, head_dim), layout = call.q.shape, call.layout
    dtype = str(call.q.dtype).removeprefix("torch.")
    wanted = (dtype, head_dim, layout.q_block_size, call.needs_grad)
    alike = [row for row in rows if (row.dtype, row.head_dim, row.block_size, row.backward) == wanted]
    if not alike or not layout.nnz_blocks:
        return None
    sizes = (tokens, batch * heads, layout.density)

    def far(row: Measured) -> list[float]:
        return [abs(log(a / b)) for a, b in zip((row.tokens, row.heads, row.density), sizes, strict=True)]

    within = [row for row in alike if max(far(row)) <= log(REACH) + 1e-9]
    if not within:
        return None
    row_skew, column_skew = skews(layout)

    def distance(row: Measured) -> float:
        return sum(far(row)) + abs(log(row.row_skew / row_skew)) + abs(log(row.column_skew / column_skew))

    return min(within, key=distance)


def skews(layout: BlockLayout) -> tuple[float, float]:
    """The longest row and the longest column of blocks, each over the mean; read back once for a layout.

    Columns are counted over all groups together.
    """
    known = kept_with(layout)
    if ("skews",) not in known:
        columns = torch.bincount(layout.col_indices, minlength=layout.num_kv_blocks)
        row, column = torch.stack([layout.row_counts.max(), columns.max()]).tolist()
        each = layout.nnz_blocks / layout.num_groups
        known["skews",] = (row * layout.num_q_blocks / each, column * layout.num_kv_blocks / layout.nnz_blocks)
    found: tuple[float, float] = known["skews",]
    return found


def _is_measured_kind(call: AttentionCall) -> bool:
    """Whether the call asks for no more than the cells do: square, whole and plain, with sums in any order."""
    layout = call.layout
    return (
        layout.q_block_size == layout.kv_block_size
        and layout.q_tokens == layout.kv_tokens
        and call.queries_per_kv == 1
        and not call.deterministic
        and not call.return_lse
        and why_not_plain(call, "auto") is None
    )


def _device_rows(device: torch.device) -> tuple[Measured, ...]:
    return of_device(table(), *place(device))


@cache
def place(device: torch.device) -> tuple[str, str]:
    """(``"sm_90"``, the GPU's name); empty strings where there is no CUDA."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "", ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)), torch.cuda.get_device_name(device)
