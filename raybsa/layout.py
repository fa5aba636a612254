"""BlockLayout: which KV blocks each query block attends. The whole platform speaks in it.

Blocks are stored as CSR (the words are those of ``torch.sparse``): memory is O(nnz), and nothing of size
``num_blocks**2`` is built unless a caller asks for it with ``to_dense``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, overload

import torch
from torch import Tensor

from raybsa.handles import new_handle

_SHADES = " ░▒▓█"


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Which KV blocks each query block attends.

    The constructor checks shapes and types only; ``validate`` checks the contents in O(nnz). ``from_rows``,
    ``from_dense`` and ``from_blocks`` build layouts whose contents are right by construction.

    Args:
        crow_indices: (G, num_q_blocks + 1) int64. ``col_indices[crow_indices[g, i]:crow_indices[g, i + 1]]`` are the KV
            blocks of query block ``i`` in group ``g``; offsets are absolute. G is 1 (all heads share the layout),
            ``num_heads`` or ``batch * num_heads`` (group ``b * num_heads + h``).
        col_indices: (nnz,) int32, ascending within a row; indices into the KV blocks at hand.
        q_len: query tokens of the whole (global) sequence.
        kv_len: key tokens of the whole (global) sequence.
        q_block_size: tokens of a query block, a power of two.
        kv_block_size: tokens of a KV block, a power of two.
        causal: query token i sees key token j only if ``j <= i`` (global positions, top-left aligned). A causal layout
            holds no block that lies wholly above the diagonal.
        q_block_ids: (num_q_blocks,) int64, strictly increasing global positions of the query blocks at hand;
            None means all of them, ``0 .. ceil(q_len / q_block_size) - 1``.
        kv_block_ids: the same for KV blocks.
        transient: its columns follow from data and serve one call, so that what pays only for a layout used again (a
            choice among measured backends) is not done for it.
        handle: by which ``raybsa.handles`` finds the layout in this process, never given.
    """

    crow_indices: Tensor
    col_indices: Tensor
    q_len: int
    kv_len: int
    q_block_size: int
    kv_block_size: int
    causal: bool = False
    q_block_ids: Tensor | None = None
    kv_block_ids: Tensor | None = None
    transient: bool = False
    handle: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_geometry(self.q_len, self.kv_len, self.q_block_size, self.kv_block_size)
        crow, col = self.crow_indices, self.col_indices
        if crow.dim() != 2 or crow.dtype != torch.int64 or crow.shape[0] < 1 or crow.shape[1] < 1:
            raise ValueError(f"crow_indices must be int64 (G, num_q_blocks + 1), got {crow.dtype} {tuple(crow.shape)}")
        if col.dim() != 1 or col.dtype != torch.int32:
            raise ValueError(f"col_indices must be int32 (nnz,), got {col.dtype} {tuple(col.shape)}")
        for name, ids in (("q_block_ids", self.q_block_ids), ("kv_block_ids", self.kv_block_ids)):
            if ids is not None and (ids.dim() != 1 or ids.dtype != torch.int64):
                raise ValueError(f"{name} must be int64 (num_blocks,), got {ids.dtype} {tuple(ids.shape)}")
        tensors = [t for t in (crow, col, self.q_block_ids, self.kv_block_ids) if t is not None]
        if len({t.device for t in tensors}) > 1:
            raise ValueError(f"the tensors of a layout must share a device, got {[str(t.device) for t in tensors]}")
        wanted = num_blocks(self.q_len, self.q_block_size) if self.q_block_ids is None else len(self.q_block_ids)
        if crow.shape[1] - 1 != wanted:
            raise ValueError(f"crow_indices must have {wanted} + 1 columns, got {crow.shape[1]}")
        object.__setattr__(self, "handle", new_handle(self))

    def __setstate__(self, state: dict[str, object]) -> None:
        """A copy, or what came from another process, is known here by a handle of its own."""
        self.__dict__.update(state)
        object.__setattr__(self, "handle", new_handle(self))

    # ---- sizes -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return self.col_indices.device

    @property
    def num_groups(self) -> int:
        """1, num_heads or batch * num_heads."""
        return self.crow_indices.shape[0]

    @property
    def num_q_blocks(self) -> int:
        """Rows: query blocks, the ragged last one included."""
        return self.crow_indices.shape[1] - 1

    @property
    def num_kv_blocks(self) -> int:
        """Columns: KV blocks, the ragged last one included."""
        if self.kv_block_ids is not None:
            return len(self.kv_block_ids)
        return num_blocks(self.kv_len, self.kv_block_size)

    @property
    def nnz_blocks(self) -> int:
        """Kept blocks, of all groups together."""
        return self.col_indices.shape[0]

    @cached_property
    def q_tokens(self) -> int:
        """Query tokens at hand: what ``q.shape[2]`` must be. Equals ``q_len`` unless this is a selection."""
        return _tokens_at_hand(self.q_block_ids, self.q_len, self.q_block_size)

    @cached_property
    def kv_tokens(self) -> int:
        """Key tokens at hand: what ``k.shape[2]`` must be."""
        return _tokens_at_hand(self.kv_block_ids, self.kv_len, self.kv_block_size)

    @cached_property
    def allowed_blocks(self) -> Tensor:
        """(num_q_blocks,) int64: the KV blocks at hand that causality lets each query block see."""
        if not self.causal:
            return torch.full((self.num_q_blocks,), self.num_kv_blocks, dtype=torch.int64, device=self.device)
        last_query = self.q_block_starts + self._q_block_lengths - 1
        return torch.searchsorted(self.kv_block_starts, last_query, right=True)

    @cached_property
    def density(self) -> float:
        """nnz blocks / allowed blocks, over all groups (0 if nothing is allowed). Only a causal layout reads back."""
        each = int(self.allowed_blocks.sum()) if self.causal else self.num_q_blocks * self.num_kv_blocks
        allowed = each * self.num_groups
        return self.nnz_blocks / allowed if allowed else 0.0

    # ---- positions ---------------------------------------------------------------------------------------------

    @cached_property
    def q_block_starts(self) -> Tensor:
        """(num_q_blocks,) int64: global position of each query block's first token."""
        return self._ids(self.q_block_ids, self.num_q_blocks) * self.q_block_size

    @cached_property
    def kv_block_starts(self) -> Tensor:
        """(num_kv_blocks,) int64: global position of each KV block's first token."""
        return self._ids(self.kv_block_ids, self.num_kv_blocks) * self.kv_block_size

    @cached_property
    def _q_block_lengths(self) -> Tensor:
        return (self.q_len - self.q_block_starts).clamp(max=self.q_block_size)

    @cached_property
    def row_counts(self) -> Tensor:
        """(G, num_q_blocks) int64: kept KV blocks of each query block."""
        return self.crow_indices[:, 1:] - self.crow_indices[:, :-1]

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """(nnz,) int64 each: group, query block and KV block of every kept block, in storage order."""
        flat = torch.arange(self.num_groups * self.num_q_blocks, device=self.device)
        row = torch.repeat_interleave(flat, self.row_counts.reshape(-1), output_size=self.nnz_blocks)
        rows = max(self.num_q_blocks, 1)
        return row // rows, row % rows, self.col_indices.long()

    def crosses_diagonal(self) -> Tensor:
        """(nnz,) bool: the kept blocks that causality cuts (all False where the layout is not causal)."""
        if not self.causal:
            return torch.zeros(self.nnz_blocks, dtype=torch.bool, device=self.device)
        _, row, col = self.coordinates()
        last_key = (self.kv_block_starts[col] + self.kv_block_size).clamp(max=self.kv_len) - 1
        return last_key > self.q_block_starts[row]

    # ---- making ------------------------------------------------------------------------------------------------

    @classmethod
    def from_blocks(
        cls,
        group: Tensor,
        row: Tensor,
        col: Tensor,
        *,
        num_groups: int,
        q_len: int,
        kv_len: int,
        q_block_size: int,
        kv_block_size: int | None = None,
        causal: bool = False,
    ) -> BlockLayout:
        """A layout from block coordinates in any order. Repeats count once; a causal layout drops blocks above.

        Args:
            group, row, col: (n,) integer tensors on one device: group, query block and KV block of each kept block.
            num_groups: G.

        Raises:
            ValueError: a coordinate is out of range, or a size is not positive.
        """
        kv_block_size = q_block_size if kv_block_size is None else kv_block_size
        check_geometry(q_len, kv_len, q_block_size, kv_block_size)
        rows, cols = num_blocks(q_len, q_block_size), num_blocks(kv_len, kv_block_size)
        for name, index, size in (("group", group, num_groups), ("row", row, rows), ("column", col, cols)):
            if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < size):
                raise ValueError(
                    f"{name} indices must lie in 0..{size - 1}, got {int(index.min())}..{int(index.max())}"
                )
        group, row, col = group.long(), row.long(), col.long()
        if causal:
            last_query = ((row + 1) * q_block_size).clamp(max=q_len) - 1
            seen = col * kv_block_size <= last_query
            group, row, col = group[seen], row[seen], col[seen]
        key = torch.unique((group * rows + row) * cols + col)
        return cls(
            _offsets(key // cols, num_groups, rows),
            (key % cols).to(torch.int32),
            q_len,
            kv_len,
            q_block_size,
            kv_block_size,
            causal,
        )

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
        *,
        q_len: int,
        kv_len: int,
        q_block_size: int,
        kv_block_size: int | None = None,
        causal: bool = False,
        device: torch.device | str | None = None,
    ) -> BlockLayout:
        """A layout from lists: ``rows[i]`` are the KV blocks of query block i (``rows[g][i]`` with several groups)."""
        grouped: list = list(rows) if rows and rows[0] and isinstance(rows[0][0], Sequence) else [rows]
        check_geometry(q_len, kv_len, q_block_size, q_block_size if kv_block_size is None else kv_block_size)
        wanted = num_blocks(q_len, q_block_size)
        for lists in grouped:
            if len(lists) != wanted:
                raise ValueError(f"rows must list {wanted} query blocks (q_len / q_block_size), got {len(lists)}")
        blocks = [(g, i, j) for g, lists in enumerate(grouped) for i, cols in enumerate(lists) for j in cols]
        index = torch.tensor(blocks, dtype=torch.int64, device=device).reshape(-1, 3)
        return cls.from_blocks(
            *index.unbind(1),
            num_groups=len(grouped),
            q_len=q_len,
            kv_len=kv_len,
            q_block_size=q_block_size,
            kv_block_size=kv_block_size,
            causal=causal,
        )

    @classmethod
    def from_dense(
        cls,
        mask: Tensor,
        *,
        q_len: int,
        kv_len: int,
        q_block_size: int,
        kv_block_size: int | None = None,
        causal: bool = False,
    ) -> BlockLayout:
        """A layout from a boolean mask over blocks: (nQ, nKV), (H, nQ, nKV) or (B, H, nQ, nKV)."""
        kv_block_size = q_block_size if kv_block_size is None else kv_block_size
        check_geometry(q_len, kv_len, q_block_size, kv_block_size)
        shape = (num_blocks(q_len, q_block_size), num_blocks(kv_len, kv_block_size))
        if mask.dtype != torch.bool or mask.dim() not in (2, 3, 4) or tuple(mask.shape[-2:]) != shape:
            raise ValueError(f"mask must be bool (..., {shape[0]}, {shape[1]}), got {mask.dtype} {tuple(mask.shape)}")
        flat = mask.reshape(-1, *shape)
        return cls.from_blocks(
            *flat.nonzero().unbind(1),
            num_groups=len(flat),
            q_len=q_len,
            kv_len=kv_len,
            q_block_size=q_block_size,
            kv_block_size=kv_block_size,
            causal=causal,
        )

    def to_dense(self) -> Tensor:
        """(G, num_q_blocks, num_kv_blocks) bool. O(num_blocks**2) memory: for looking at small layouts."""
        dense = torch.zeros(
            self.num_groups, self.num_q_blocks, self.num_kv_blocks, dtype=torch.bool, device=self.device
        )
        dense[self.coordinates()] = True
        return dense

    def to(self, device: torch.device | str) -> BlockLayout:
        """This layout on ``device``; itself where it is there already."""
        if self.device == torch.empty(0, device=device).device:
            return self
        ids = [None if t is None else t.to(device) for t in (self.q_block_ids, self.kv_block_ids)]
        return self._with(self.crow_indices.to(device), self.col_indices.to(device), *ids)

    def validate(self) -> BlockLayout:
        """Checks the contents in O(nnz) and returns self.

        Raises:
            ValueError: offsets that do not ascend from 0 to nnz, a column out of range, columns not strictly ascending
                in a row, ids not strictly ascending or out of range, or a block above a causal layout's diagonal.
        """
        flat = torch.cat([self.crow_indices[:, :-1].reshape(-1), self.crow_indices[-1:, -1]])
        joined = torch.equal(self.crow_indices[:-1, -1], self.crow_indices[1:, 0])
        if int(flat[0]) != 0 or int(flat[-1]) != self.nnz_blocks or bool((flat.diff() < 0).any()) or not joined:
            raise ValueError(f"crow_indices must ascend from 0 to nnz = {self.nnz_blocks} without gaps between groups")
        for name, ids, total in (
            ("q_block_ids", self.q_block_ids, num_blocks(self.q_len, self.q_block_size)),
            ("kv_block_ids", self.kv_block_ids, num_blocks(self.kv_len, self.kv_block_size)),
        ):
            if ids is None or not len(ids):
                continue
            if bool((ids.diff() <= 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= total:
                raise ValueError(f"{name} must ascend strictly within 0..{total - 1}")
        group, row, col = self.coordinates()
        if col.numel() and not (int(col.min()) >= 0 and int(col.max()) < self.num_kv_blocks):
            raise ValueError(
                f"col_indices must lie in 0..{self.num_kv_blocks - 1}, got {int(col.min())}..{int(col.max())}"
            )
        key = (group * self.num_q_blocks + row) * self.num_kv_blocks + col
        if bool((key.diff() <= 0).any()):
            raise ValueError("col_indices must ascend strictly within a row")
        if bool((col >= self.allowed_blocks[row]).any()):
            raise ValueError("a causal layout must hold no block above the diagonal")
        return self

    # ---- operations --------------------------------------------------------------------------------------------

    def __or__(self, other: BlockLayout) -> BlockLayout:
        """The blocks of either. Groups broadcast (1 with G); geometry and causality must agree."""
        a, b = self._aligned(other)
        return self._from_keys(torch.unique(torch.cat([a, b])), max(self.num_groups, other.num_groups))

    def __and__(self, other: BlockLayout) -> BlockLayout:
        """The blocks of both."""
        a, b = self._aligned(other)
        keys, counts = torch.unique(torch.cat([a, b]), return_counts=True)
        return self._from_keys(keys[counts == 2], max(self.num_groups, other.num_groups))

    @overload
    def transpose(self, return_index: Literal[False] = False) -> BlockLayout: ...
    @overload
    def transpose(self, return_index: Literal[True]) -> tuple[BlockLayout, Tensor]: ...
    def transpose(self, return_index: bool = False) -> BlockLayout | tuple[BlockLayout, Tensor]:
        """Rows are KV blocks, columns are the query blocks that see them.

        Causality orders (query, key) pairs, so the transpose only lists blocks and is never ``causal`` itself.
        ``index`` (nnz,) int64 maps each block to its place in this layout: ``block_bias[index]`` follows.
        """
        group, row, col = self.coordinates()
        order = torch.argsort(group * self.num_kv_blocks + col, stable=True)
        flipped = BlockLayout(
            _offsets((group * self.num_kv_blocks + col)[order], self.num_groups, self.num_kv_blocks),
            row[order].to(torch.int32),
            self.kv_len,
            self.q_len,
            self.kv_block_size,
            self.q_block_size,
            False,
            self.kv_block_ids,
            self.q_block_ids,
        )
        return (flipped, order) if return_index else flipped

    @overload
    def select(
        self, q_blocks: Tensor | None, kv_blocks: Tensor | None, return_index: Literal[False] = False
    ) -> BlockLayout: ...
    @overload
    def select(
        self, q_blocks: Tensor | None, kv_blocks: Tensor | None, return_index: Literal[True]
    ) -> tuple[BlockLayout, Tensor]: ...
    def select(
        self, q_blocks: Tensor | None, kv_blocks: Tensor | None, return_index: bool = False
    ) -> BlockLayout | tuple[BlockLayout, Tensor]:
        """The part of the layout that a rank or a hop works on. Global positions are kept.

        Args:
            q_blocks: strictly increasing global ids of the query blocks to keep; None keeps all at hand.
            kv_blocks: the same for KV blocks.
            return_index: also return (nnz,) int64, each kept block's place in this layout.

        Raises:
            ValueError: ids that do not ascend strictly, or that this layout does not hold.
        """
        q_ids, q_place = self._renumber("q_blocks", q_blocks, self.q_block_ids, self.num_q_blocks)
        kv_ids, kv_place = self._renumber("kv_blocks", kv_blocks, self.kv_block_ids, self.num_kv_blocks)
        counts = self.row_counts if q_place is None else self.row_counts[:, q_place]
        starts = self.crow_indices[:, :-1] if q_place is None else self.crow_indices[:, :-1][:, q_place]
        row = torch.repeat_interleave(torch.arange(counts.numel(), device=self.device), counts.reshape(-1))
        before = counts.reshape(-1).cumsum(0) - counts.reshape(-1)
        index = (starts.reshape(-1) - before)[row] + torch.arange(len(row), device=self.device)
        col = self.col_indices[index]
        if kv_place is not None:
            renumbered = torch.full((self.num_kv_blocks,), -1, dtype=torch.int32, device=self.device)
            renumbered[kv_place] = torch.arange(len(kv_place), dtype=torch.int32, device=self.device)
            col = renumbered[col]
            kept = (col >= 0).nonzero()[:, 0]
            row, col, index = row[kept], col[kept], index[kept]
        selected = self._with(_offsets(row, self.num_groups, counts.shape[1]), col, q_ids, kv_ids)
        return (selected, index) if return_index else selected

    def repeat_heads(self, repeats: int) -> BlockLayout:
        """A layout per KV head as one per query head: every group ``repeats`` times in a row (as GQA shares heads)."""
        if repeats < 1:
            raise ValueError(f"repeats must be positive, got {repeats}")
        group, row, col = self.coordinates()
        keys = (group * self.num_q_blocks + row) * self.num_kv_blocks + col
        size = self.num_q_blocks * self.num_kv_blocks
        copies = torch.arange(repeats, device=self.device)
        spread = (keys + (group * (repeats - 1)) * size)[:, None] + copies * size
        return self._from_keys(spread.reshape(-1).sort().values, self.num_groups * repeats)

    # ---- looking -----------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """A stable hash of geometry and contents, equal on every device and rank."""
        meta = (self.q_len, self.kv_len, self.q_block_size, self.kv_block_size, self.causal, self.num_groups)
        state = hashlib.sha256(repr(meta).encode())
        for tensor in (
            self.crow_indices,
            self.col_indices,
            self._ids(self.q_block_ids, self.num_q_blocks),
            self._ids(self.kv_block_ids, self.num_kv_blocks),
        ):
            state.update(tensor.cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:32]

    def describe(self, group: int = 0, max_cells: int = 64) -> str:
        """A picture in text of one group: darker cells keep more of their blocks; ``·`` lies above the diagonal."""
        if not 0 <= group < self.num_groups:
            raise ValueError(f"group must lie in 0..{self.num_groups - 1}, got {group}")
        kept, allowed = self.picture(group, max_cells)
        lines = [str(self)]
        for kept_row, allowed_row in zip(kept.tolist(), allowed.tolist(), strict=True):
            cells = [
                "·" if not can else _SHADES[min(4, -(-4 * int(have) // int(can)))]
                for have, can in zip(kept_row, allowed_row, strict=True)
            ]
            lines.append("".join(cell * 2 for cell in cells))
        return "\n".join(lines)

    def picture(self, group: int = 0, max_cells: int = 64) -> tuple[Tensor, Tensor]:
        """(rows, cols) int64 each, at most ``max_cells`` a side: kept and allowed blocks in each cell, on the CPU."""
        rows, cols = min(self.num_q_blocks, max_cells), min(self.num_kv_blocks, max_cells)
        begin, end = self.crow_indices[group, 0], self.crow_indices[group, -1]
        counts = self.row_counts[group]
        row = torch.repeat_interleave(torch.arange(self.num_q_blocks, device=self.device), counts)
        col = self.col_indices[int(begin) : int(end)].long()
        cell = (row * rows // max(self.num_q_blocks, 1)) * cols + col * cols // max(self.num_kv_blocks, 1)
        kept = torch.bincount(cell, minlength=rows * cols).view(rows, cols).cpu()
        edges = (torch.arange(cols + 1, device="cpu") * self.num_kv_blocks + cols - 1) // max(cols, 1)
        seen = self.allowed_blocks.cpu()[:, None].clamp(max=edges[1:]) - edges[:-1]
        allowed = torch.zeros(rows, cols, dtype=torch.int64, device="cpu")
        cell_row = torch.arange(self.num_q_blocks, device="cpu") * rows // max(self.num_q_blocks, 1)
        allowed.index_add_(0, cell_row, seen.clamp(min=0))
        return kept, allowed

    def __str__(self) -> str:
        heads = "all heads share it" if self.num_groups == 1 else f"{self.num_groups} groups"
        return (
            f"BlockLayout: {self.q_len} x {self.kv_len} tokens, {self.num_q_blocks} x {self.num_kv_blocks} blocks of "
            f"{self.q_block_size} x {self.kv_block_size}, {heads}, {'causal' if self.causal else 'not causal'}, "
            f"{self.nnz_blocks} blocks kept, density {self.density:.2%}"
        )

    # ---- for ourselves -----------------------------------------------------------------------------------------

    def _ids(self, ids: Tensor | None, count: int) -> Tensor:
        return torch.arange(count, device=self.device) if ids is None else ids

    def _with(self, crow: Tensor, col: Tensor, q_block_ids: Tensor | None, kv_block_ids: Tensor | None) -> BlockLayout:
        return BlockLayout(
            crow,
            col,
            self.q_len,
            self.kv_len,
            self.q_block_size,
            self.kv_block_size,
            self.causal,
            q_block_ids,
            kv_block_ids,
        )

    def _from_keys(self, keys: Tensor, num_groups: int) -> BlockLayout:
        cols = max(self.num_kv_blocks, 1)
        crow = _offsets(keys // cols, num_groups, self.num_q_blocks)
        return self._with(crow, (keys % cols).to(torch.int32), self.q_block_ids, self.kv_block_ids)

    def _aligned(self, other: BlockLayout) -> tuple[Tensor, Tensor]:
        if not isinstance(other, BlockLayout):
            raise TypeError(f"a layout combines with a BlockLayout, got {type(other).__name__}")
        for name in ("q_len", "kv_len", "q_block_size", "kv_block_size", "causal", "device"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"layouts must agree on {name}, got {getattr(self, name)} and {getattr(other, name)}")
        for name in ("q_block_starts", "kv_block_starts"):
            if not torch.equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"layouts must hold the same blocks, {name} differ")
        groups = max(self.num_groups, other.num_groups)
        if {self.num_groups, other.num_groups} - {1, groups}:
            raise ValueError(f"groups must be equal or 1, got {self.num_groups} and {other.num_groups}")
        a, b = (x if x.num_groups == groups else x.repeat_heads(groups) for x in (self, other))
        return a._keys(), b._keys()

    def _keys(self) -> Tensor:
        group, row, col = self.coordinates()
        return (group * self.num_q_blocks + row) * self.num_kv_blocks + col

    def _renumber(
        self, name: str, wanted: Tensor | None, held: Tensor | None, count: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """The ids to keep and their places among the blocks at hand; (held, None) where all are kept."""
        if wanted is None:
            return held, None
        wanted = wanted.to(self.device, torch.int64)
        held = self._ids(held, count)
        place = torch.searchsorted(held, wanted)
        found = torch.cat([held, held.new_full((1,), -1)])[place]
        if bool((wanted.diff() <= 0).any() or (found != wanted).any() or (wanted < 0).any()):
            raise ValueError(f"{name} must be strictly increasing ids of blocks at hand, got {wanted.tolist()[:16]}")
        return wanted, place


def num_blocks(length: int, block_size: int) -> int:
    """Blocks that cover ``length`` tokens; the last may be ragged."""
    return -(-length // block_size)


def check_geometry(q_len: int, kv_len: int, q_block_size: int, kv_block_size: int) -> None:
    """Raises ValueError unless lengths are positive and block sizes are positive powers of two."""
    for name, length in (("q_len", q_len), ("kv_len", kv_len)):
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"{name} must be a positive integer, got {length!r}")
    for name, size in (("q_block_size", q_block_size), ("kv_block_size", kv_block_size)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1 or size & (size - 1):
            raise ValueError(f"{name} must be a positive power of two, got {size!r}")


def _tokens_at_hand(ids: Tensor | None, length: int, block_size: int) -> int:
    if ids is None:
        return length
    if not len(ids):
        return 0
    ragged = max(0, (int(ids[-1]) + 1) * block_size - length)
    return len(ids) * block_size - ragged


def _offsets(flat_rows: Tensor, num_groups: int, num_rows: int) -> Tensor:
    """CSR offsets (num_groups, num_rows + 1) from the ascending flat row (group * num_rows + row) of every block."""
    counts = torch.bincount(flat_rows, minlength=num_groups * num_rows)
    total = torch.zeros(num_groups * num_rows + 1, dtype=torch.int64, device=flat_rows.device)
    torch.cumsum(counts, 0, out=total[1:])
    starts = torch.arange(num_groups, device=flat_rows.device)[:, None] * num_rows
    return total[starts + torch.arange(num_rows + 1, device=flat_rows.device)]
