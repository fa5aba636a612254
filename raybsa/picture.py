"""A layout's picture: rows and columns gathered in a few cells, as numbers and as text."""

from __future__ import annotations

import torch
from torch import Tensor

from raybsa.csr import Csr

_SHADES = " ░▒▓█"


def cells(kept: Csr, allowed: Tensor, max_cells: int) -> tuple[Tensor, Tensor]:
    """(rows, cols) int64 each, at most ``max_cells`` a side: kept and allowed blocks in each cell, on the CPU.

    Args:
        kept: one group.
        allowed: (num_rows,) int64: each row may hold that many, the first ones.
    """
    num_rows, num_columns = kept.num_rows, kept.num_columns
    rows, cols = min(num_rows, max_cells), min(num_columns, max_cells)
    _, row, col = kept.coordinates()
    cell = (row * rows // max(num_rows, 1)) * cols + col * cols // max(num_columns, 1)
    have = torch.bincount(cell, minlength=rows * cols).view(rows, cols).cpu()
    edges = (torch.arange(cols + 1, device="cpu") * num_columns + cols - 1) // max(cols, 1)
    seen = allowed.cpu()[:, None].clamp(max=edges[1:]) - edges[:-1]
    can = torch.zeros(rows, cols, dtype=torch.int64, device="cpu")
    cell_row = torch.arange(num_rows, device="cpu") * rows // max(num_rows, 1)
    can.index_add_(0, cell_row, seen.clamp(min=0))
    return have, can


def shades(have: Tensor, can: Tensor) -> list[str]:
    """Lines of text: darker cells hold more of what they can; ``·`` can hold nothing."""
    return [
        "".join(
            ("·" if not b else _SHADES[min(4, -(-4 * int(a) // int(b)))]) * 2 for a, b in zip(row, row_can, strict=True)
        )
        for row, row_can in zip(have.tolist(), can.tolist(), strict=True)
    ]
