"""Blocks: an explicit list of blocks from a Parquet file, and how to save one from a layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from raybsa.layout import BlockLayout
from raybsa.patterns.grid import Grid
from raybsa.patterns.pattern import Pattern

_COLUMNS = ("group", "q_block", "kv_block")
_KEY = b"raybsa.blocks"
_GEOMETRY = ("q_len", "kv_len", "q_block_size", "kv_block_size")


@dataclass(frozen=True)
class Blocks(Pattern):
    """The blocks listed in a file that ``save_blocks`` wrote. It fits the lengths and block sizes that it was made for.

    A density below that of the list cuts the longest rows to one length, by their farthest blocks; one above it adds
    the nearest of the other blocks, equally many in all rows.

    Args:
        path: a Parquet file of the columns ``group, q_block, kv_block`` (one row a block) with the layout's geometry in
            its metadata. One group serves all heads; else there is one a head.

    Raises:
        ValueError: the file is missing or not such a list; on use, a layout of other lengths, block sizes or heads.
    """

    path: str
    family: ClassVar[str] = "blocks"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        if not Path(self.path).is_file():
            raise ValueError(f"blocks needs a file saved by save_blocks, got path {self.path!r}")
        _ = self._geometry

    @property
    def varies_by_head(self) -> bool:
        return self._geometry["num_groups"] > 1

    def blocks(self, grid: Grid) -> tuple[Tensor, Tensor]:
        self._check(grid)
        group, q_block, kv_block = (column.to(grid.device) for column in self._load())
        heads = torch.tensor(grid.heads, device=grid.device)
        place = torch.arange(len(heads), device=grid.device)[:, None] * grid.num_q_blocks
        if not self.varies_by_head:
            return (place + q_block).reshape(-1), kv_block.repeat(len(heads))
        begin = torch.full((grid.num_heads,), -1, dtype=torch.int64, device=grid.device)
        begin[heads] = place[:, 0]
        held = begin[group] >= 0
        return (begin[group] + q_block)[held], kv_block[held]

    def _check(self, grid: Grid) -> None:
        for name in _GEOMETRY:
            if getattr(grid, name) != self._geometry[name]:
                raise ValueError(
                    f"{self.path} lists blocks for {name} {self._geometry[name]}, got {getattr(grid, name)}"
                )
        if self.varies_by_head and grid.num_heads != self._geometry["num_groups"]:
            raise ValueError(f"{self.path} lists blocks for {self._geometry['num_groups']} heads, got {grid.num_heads}")

    @cached_property
    def _geometry(self) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            schema = pq.read_schema(self.path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a Parquet file: {error}") from error
        if _KEY not in (schema.metadata or {}) or set(schema.names) != set(_COLUMNS):
            raise ValueError(
                f"{self.path} must be a list of blocks saved by save_blocks, it has columns {schema.names}"
            )
        return json.loads(schema.metadata[_KEY])

    def _load(self) -> list[Tensor]:
        import pyarrow.parquet as pq

        table = pq.read_table(self.path)
        return [torch.from_numpy(table[name].to_numpy().copy()).long() for name in _COLUMNS]


def save_blocks(layout: BlockLayout, path: str | Path) -> Blocks:
    """Writes the blocks of a whole layout to ``path`` and returns the rule that reads them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if layout.q_block_ids is not None or layout.kv_block_ids is not None:
        raise ValueError("save_blocks takes a whole layout, got a selection of its blocks")
    geometry = {name: getattr(layout, name) for name in _GEOMETRY} | {"num_groups": layout.num_groups}
    columns = {n: t.to("cpu", torch.int32).numpy() for n, t in zip(_COLUMNS, layout.coordinates(), strict=True)}
    pq.write_table(pa.table(columns).replace_schema_metadata({_KEY: json.dumps(geometry)}), str(path))
    return Blocks(str(path))
