"""The tunables of the Triton kernels: tile sizes, warps and pipeline stages, in one place for a sweep to replace.

A program keeps ``rows`` tokens (queries in the forward and in dQ, keys in dK/dV) and walks the other side ``cols``
tokens at a time. Blocks smaller than ``cols`` are gathered into one tile; blocks larger than ``rows`` are shared by
several programs. Those of 16 bits and head_dim up to 128 come from sweeps on an H100, of 16 and 32 rows on an H200
(docs/kernel-log.md), the others from compiling and reading registers, spills and shared memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from raybsa.kernels.triton_setup import shared_memory

Pass = Literal["forward", "grad_q", "grad_kv"]
GATHERED_COLS = 64  # where blocks are smaller than a tile, no more tokens than this are gathered


class Tile(NamedTuple):
    """rows, cols: tokens, powers of two from 16. warps, stages: Triton's launch options. descriptors: load the walked
    side by TMA where blocks hold whole tiles (``triton_descriptors``)."""

    rows: int
    cols: int
    warps: int
    stages: int
    descriptors: bool = False


# (pass, bytes of a number, padded head_dim up to): the first tile whose rows fit into the block serves it.
TILES: dict[tuple[Pass, int, int], list[Tile]] = {
    ("forward", 2, 64): [
        Tile(128, 128, 4, 3, True),
        Tile(64, 64, 4, 3, True),
        Tile(32, 32, 1, 2, True),
        Tile(16, 32, 1, 3),
    ],
    ("forward", 2, 128): [
        Tile(128, 64, 4, 2, True),
        Tile(64, 64, 4, 1, True),
        Tile(32, 32, 1, 2, True),
        Tile(16, 32, 1, 3),
    ],
    ("forward", 2, 256): [Tile(128, 64, 8, 2, True), Tile(64, 64, 4, 2, True), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)],
    ("grad_q", 2, 64): [Tile(128, 64, 8, 3, True), Tile(64, 64, 4, 3, True), Tile(32, 32, 1, 3), Tile(16, 32, 1, 3)],
    ("grad_q", 2, 128): [Tile(128, 64, 8, 3, True), Tile(64, 64, 4, 2, True), Tile(32, 64, 2, 2), Tile(16, 64, 2, 2)],
    ("grad_q", 2, 256): [Tile(64, 64, 8, 1, True), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)],
    ("grad_kv", 2, 64): [Tile(64, 64, 4, 3, True), Tile(32, 32, 1, 3), Tile(16, 32, 1, 3)],
    ("grad_kv", 2, 128): [Tile(64, 64, 4, 2, True), Tile(32, 32, 2, 3), Tile(16, 32, 2, 3)],
    ("grad_kv", 2, 256): [Tile(64, 32, 8, 2, True), Tile(32, 32, 8, 2), Tile(16, 32, 4, 2)],
    ("forward", 4, 64): [Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)],
    ("forward", 4, 128): [Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)],
    ("forward", 4, 256): [Tile(32, 32, 8, 1), Tile(16, 32, 4, 1)],
    ("grad_q", 4, 64): [Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)],
    ("grad_q", 4, 128): [Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)],
    ("grad_q", 4, 256): [Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)],
    ("grad_kv", 4, 64): [Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 2)],
    ("grad_kv", 4, 128): [Tile(32, 32, 8, 2), Tile(16, 32, 4, 2)],
    ("grad_kv", 4, 256): [Tile(16, 16, 4, 1)],
}


def padded_head_dim(head_dim: int) -> int:
    """The next power of two, at least what ``tl.dot`` takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


@lru_cache(maxsize=256)
def choose_tile(
    kind: Pass, head_dim: int, dtype: torch.dtype, row_block: int, walked_block: int, device: torch.device
) -> Tile:
    """The tile of a pass whose kept side comes in blocks of ``row_block`` tokens, the walked in ``walked_block``."""
    padded = padded_head_dim(head_dim)
    tiles = TILES[kind, dtype.itemsize, next(d for d in (64, 128, 256) if padded <= d)]
    tile = next((t for t in tiles if t.rows <= row_block), tiles[-1])
    if walked_block < tile.cols:
        tile = tile._replace(cols=min(tile.cols, GATHERED_COLS))
    return _fitted(tile, padded * dtype.itemsize, kept=1 if kind == "forward" else 2, room=shared_memory(device))


def _fitted(tile: Tile, token_bytes: int, kept: int, room: int) -> Tile:
    """The tile with as many stages, and then as many columns, as the GPU's shared memory holds."""
    for cols in (tile.cols, tile.cols // 2, tile.cols // 4):
        for stages in range(tile.stages, 0, -1):
            if cols >= 16 and (kept * tile.rows + 2 * cols * stages) * token_bytes <= room:
                return tile._replace(cols=cols, stages=stages)
    return tile._replace(cols=16, stages=1)
