"""The layout of a case, and which tokens see which by it, read from its lists by a loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from raybsa import BlockLayout, patterns
from raybsa.patterns.catalog import CATALOG
from tests.fuzzing.case import Case

PARAMETERS: dict[str, dict] = {
    "sliding_window": {"window": 40},
    "dilated": {"segment_lengths": (32, 64), "dilation_rates": (1, 2)},
    "global_blocks": {"num_globals": 1},
    "sink_window": {"sink": 10, "window": 30},
    "strided": {"stride": 2},
    "fixed": {"span": 3, "summary": 1},
    "random": {"num_random": 2},
    "chunked": {"chunk": 48, "shift": 16},
    "vertical_slash": {"columns": (0, 40), "offsets": (0, 20)},
    "document": {"lengths": (20, 50, 30)},
}


def rule(case: Case) -> patterns.Pattern:
    """The case's family; its random blocks are of ``layout`` alone."""
    name = {"random_blocks": "random"}.get(case.pattern, case.pattern)
    if name == "union":
        return patterns.build("butterfly") | patterns.build({"name": "random", "params": {"num_random": 1}})
    if name == "per_head":
        parts = [patterns.build("butterfly"), patterns.build("dense")]
        return patterns.per_head([parts[i % 2] for i in range(max(case.heads, 1))])
    params = PARAMETERS.get(name, {})
    if case.density is not None:  # what it sets cannot be given beside it
        params = {key: value for key, value in params.items() if key not in CATALOG[name].free}
    return patterns.build({"name": name, "params": params})


def layout(case: Case) -> BlockLayout:
    """The layout that the case is called with, on its device."""
    lengths = max(case.q_len, 1), max(case.kv_len, 1)
    sizes = {"q_block_size": case.q_block, "kv_block_size": case.kv_block, "causal": case.causal}
    if case.pattern in ("random", "empty"):
        share = 0.0 if case.pattern == "empty" else case.density or 0.5
        groups = {"one": 1, "heads": case.heads, "samples": case.heads * max(case.batch, 1)}[case.groups]
        shape = (groups, math.ceil(lengths[0] / case.q_block), math.ceil(lengths[1] / case.kv_block))
        blocks = torch.rand(shape, generator=torch.Generator().manual_seed(case.seed)) < share
        dense = blocks.to(case.device)
        return BlockLayout.from_dense(dense, q_len=lengths[0], kv_len=lengths[1], **sizes)
    return rule(case).layout(
        *lengths, num_heads=case.heads, density=case.density, device=case.device, or_least=True, **sizes
    )


def seen(case: Case, layout: BlockLayout) -> Tensor:
    """(B, H, Sq, Skv) bool: what blocks and causality let through, on the layout's device."""
    batch, heads = case.batch, case.heads
    shape = (layout.num_groups, layout.q_len, layout.kv_len)
    found = torch.zeros(shape, dtype=torch.bool)
    crow, col = layout.crow_indices.tolist(), layout.col_indices.tolist()
    for group, starts in enumerate(crow):
        for row in range(len(starts) - 1):
            rows = slice(row * layout.q_block_size, (row + 1) * layout.q_block_size)
            for column in col[starts[row] : starts[row + 1]]:
                columns = slice(column * layout.kv_block_size, (column + 1) * layout.kv_block_size)
                found[group, rows, columns] = True
    if layout.causal:
        found &= torch.arange(shape[1])[:, None] >= torch.arange(shape[2])
    groups = (1, 1) if shape[0] == 1 else (1, heads) if shape[0] == heads else (batch, heads)
    whole = found.view(*groups, *shape[1:]).expand(batch, heads, -1, -1)
    return whole[:, :, : case.q_len, : case.kv_len].to(layout.device)


def bias_of_tokens(case: Case, layout: BlockLayout, bias: Tensor) -> Tensor:
    """(B, H, Sq, Skv) of (nnz,), differentiable."""
    crow, columns = layout.crow_indices.cpu(), layout.num_kv_blocks
    counts = (crow[:, 1:] - crow[:, :-1]).flatten()
    row = torch.arange(len(counts)).repeat_interleave(counts).to(layout.device)
    flat = torch.zeros(len(counts) * columns, dtype=bias.dtype, device=bias.device)
    blocks = flat.index_put((row * columns + layout.col_indices.long(),), bias)
    blocks = blocks.view(layout.num_groups, layout.num_q_blocks, columns)
    tokens = blocks.repeat_interleave(layout.q_block_size, 1).repeat_interleave(layout.kv_block_size, 2)
    heads = case.heads
    groups = (1, 1) if layout.num_groups == 1 else (1, heads) if layout.num_groups == heads else (case.batch, heads)
    return tokens.view(*groups, *tokens.shape[1:])[:, :, : case.q_len, : case.kv_len]
