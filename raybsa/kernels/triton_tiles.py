"""The tunables of the Triton kernels: tile sizes, warps and pipeline stages, in one place for a sweep to replace.

A tile is ``rows x cols`` tokens: the program keeps ``rows`` tokens (queries in the forward and in dQ, keys in dK/dV)
and walks the other side ``cols`` tokens at a time. Blocks smaller than ``cols`` are gathered into one tile; blocks larger
than ``rows`` are shared by several programs. None of these numbers has been measured on a GPU yet (docs/kernel-log.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from raybsa.kernels.triton_setup import shared_memory

Pass = Literal["forward", "grad_q", "grad_kv"]
MIN_ROWS = 16  # the least that tl.dot takes


@dataclass(frozen=True)
class Tile:
    """rows, cols: tokens, powers of two. warps, stages: Triton's launch options."""

    rows: int
    cols: int
    warps: int
    stages: int


# (pass, bytes of an element, padded head_dim up to) -> the tile where blocks are 128; see ``choose_tile`` for smaller.
TILES: dict[tuple[Pass, int, int], Tile] = {
    ("forward", 2, 64): Tile(128, 128, 4, 3),
    ("forward", 2, 128): Tile(128, 64, 4, 2),
    ("forward", 2, 256): Tile(128, 64, 8, 2),
    ("forward", 4, 64): Tile(64, 64, 4, 2),
    ("forward", 4, 128): Tile(64, 32, 4, 2),
    ("forward", 4, 256): Tile(32, 32, 4, 1),
    ("grad_q", 2, 64): Tile(128, 64, 8, 3),
    ("grad_q", 2, 128): Tile(128, 64, 8, 2),
    ("grad_q", 2, 256): Tile(64, 32, 8, 1),
    ("grad_q", 4, 64): Tile(64, 32, 4, 2),
    ("grad_q", 4, 128): Tile(32, 32, 4, 1),
    ("grad_q", 4, 256): Tile(16, 32, 4, 1),
    ("grad_kv", 2, 64): Tile(128, 64, 8, 3),
    ("grad_kv", 2, 128): Tile(128, 64, 8, 2),
    ("grad_kv", 2, 256): Tile(64, 32, 8, 1),
    ("grad_kv", 4, 64): Tile(64, 32, 4, 2),
    ("grad_kv", 4, 128): Tile(32, 32, 4, 1),
    ("grad_kv", 4, 256): Tile(16, 32, 4, 1),
}
SMALL_ROWS_COLS = 64  # how many tokens a program of 32 rows or fewer walks at a time


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least what ``tl.dot`` takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_tile(kind: Pass, head_dim: int, dtype: torch.dtype, row_block: int, device: torch.device) -> Tile:
    """The tile of a pass whose kept side comes in blocks of ``row_block`` tokens."""
    padded = padded_head_dim(head_dim)
    tile = TILES[kind, dtype.itemsize, next(d for d in (64, 128, 256) if padded <= d)]
    rows = min(tile.rows, max(MIN_ROWS, row_block))
    if rows < tile.rows:
        cols = min(tile.cols, SMALL_ROWS_COLS) if rows < 64 else tile.cols
        tile = Tile(rows, cols, 4 if rows >= 64 or padded > 64 else 2, tile.stages)
    return _fitted(kind, tile, padded * dtype.itemsize, shared_memory(device))


def _fitted(kind: Pass, tile: Tile, token_bytes: int, room: int) -> Tile:
    """The tile with as many stages, and then as many columns, as the GPU's shared memory holds."""
    kept = tile.rows * token_bytes * (1 if kind == "forward" else 2)

    def fits(cols: int, stages: int) -> bool:
        return kept + 2 * cols * token_bytes * stages <= room

    stages = next((s for s in range(tile.stages, 0, -1) if fits(tile.cols, s)), 1)
    cols = next((c for c in (tile.cols, tile.cols // 2, tile.cols // 4) if c >= 16 and fits(c, stages)), 16)
    return Tile(tile.rows, cols, tile.warps, stages)
