"""BlockLayout: which KV blocks each query block attends. The whole platform speaks in it.

Blocks are stored as CSR (the words are those of ``torch.sparse``): memory is O(nnz), and nothing of size
``num_blocks**2`` is built unless a caller asks for it with ``to_dense``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import torch
from torch import Tensor

from raybsa.aside import made_aside
from raybsa.axis import Axis, check_geometry, whole_axes
from raybsa.csr import Csr
from raybsa.picture import cells, shades


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Which KV blocks each query block attends.

    The constructor checks shapes and types only; ``validate`` checks the contents in O(nnz), which an attention does
    before it first uses them. ``from_rows``, ``from_dense`` and ``from_blocks`` build layouts whose contents are right
    by construction.

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

    def __post_init__(self) -> None:
        check_geometry(self.q_len, self.kv_len, self.q_block_size, self.kv_block_size)
        crow, col = self.crow_indices, self.col_indices
        if crow.dim() != 2 or crow.dtype != torch.int64 or crow.shape[0] < 1 or crow.shape[1] < 1:
            raise ValueError(f"crow_indices must be int64 (G, num_q_blocks + 1), got {crow.dtype} {tuple(crow.shape)}")
        if col.dim() != 1 or col.dtype != torch.int32:
            raise ValueError(f"col_indices must be int32 (nnz,), got {col.dtype} {tuple(col.shape)}")
        devices = [t.device for t in (crow, col, self._q.ids, self._kv.ids) if t is not None]
        if len(set(devices)) > 1:
            raise ValueError(f"the tensors of a layout must share a device, got {[str(device) for device in devices]}")
        if crow.shape[1] - 1 != self._q.count:
            raise ValueError(f"crow_indices must have {self._q.count} + 1 columns, got {crow.shape[1]}")

    def __getstate__(self) -> dict[str, object]:
        """A copy or a pickle is of the fields: what was found out of them belongs to this object's tensors."""
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    # ---- its parts ---------------------------------------------------------------------------------------------

    @cached_property
    def _blocks(self) -> Csr:
        return Csr(self.crow_indices, self.col_indices, self.num_kv_blocks)

    @cached_property
    def _q(self) -> Axis:
        return Axis("q", self.q_len, self.q_block_size, self.q_block_ids, self.device)

    @cached_property
    def _kv(self) -> Axis:
        return Axis("kv", self.kv_len, self.kv_block_size, self.kv_block_ids, self.device)

    @classmethod
    def _of(cls, blocks: Csr, q: Axis, kv: Axis, causal: bool) -> BlockLayout:
        sizes = (q.length, kv.length, q.block_size, kv.block_size)
        return cls(blocks.crow_indices, blocks.col_indices, *sizes, causal, q.ids, kv.ids).trusted()

    # ---- sizes -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return self.col_indices.device

    @property
    def sizes(self) -> tuple[int, int, int, int, bool]:
        """q_len, kv_len, q_block_size, kv_block_size and causal."""
        return self.q_len, self.kv_len, self.q_block_size, self.kv_block_size, self.causal

    @property
    def version(self) -> int:
        """A larger one once a tensor of it was written to, as far as torch counts that."""
        counted = self._counted
        return counted[0]._version + counted[1]._version if len(counted) == 2 else sum(x._version for x in counted)

    @cached_property
    def _counted(self) -> tuple[Tensor, ...]:
        tensors = (self.crow_indices, self.col_indices, self.q_block_ids, self.kv_block_ids)
        return tuple(x for x in tensors if x is not None and not x.is_inference())

    @property
    def num_groups(self) -> int:
        """1, num_heads or batch * num_heads."""
        return self.crow_indices.shape[0]

    @property
    def num_q_blocks(self) -> int:
        """Rows: query blocks, the ragged last one included."""
        return self._q.count

    @property
    def num_kv_blocks(self) -> int:
        """Columns: KV blocks, the ragged last one included."""
        return self._kv.count

    @property
    def nnz_blocks(self) -> int:
        """Kept blocks, of all groups together."""
        return self.col_indices.shape[0]

    @property
    def q_tokens(self) -> int:
        """Query tokens at hand: what ``q.shape[2]`` must be. Equals ``q_len`` unless this is a selection."""
        return self._q.tokens

    @property
    def kv_tokens(self) -> int:
        """Key tokens at hand: what ``k.shape[2]`` must be."""
        return self._kv.tokens

    @made_aside
    def allowed_blocks(self) -> Tensor:
        """(num_q_blocks,) int64: the KV blocks at hand that causality lets each query block see."""
        if not self.causal:
            return torch.full((self.num_q_blocks,), self.num_kv_blocks, dtype=torch.int64, device=self.device)
        return torch.searchsorted(self.kv_block_starts, self._q.lasts, right=True)

    @made_aside
    def density(self) -> float:
        """nnz blocks / allowed blocks, over all groups (0 if nothing is allowed). Only a causal layout reads back."""
        each = int(self.allowed_blocks.sum()) if self.causal else self.num_q_blocks * self.num_kv_blocks
        allowed = each * self.num_groups
        return self.nnz_blocks / allowed if allowed else 0.0

    # ---- positions ---------------------------------------------------------------------------------------------

    @property
    def q_block_starts(self) -> Tensor:
        """(num_q_blocks,) int64: global position of each query block's first token."""
        return self._q.starts

    @property
    def kv_block_starts(self) -> Tensor:
        """(num_kv_blocks,) int64: global position of each KV block's first token."""
        return self._kv.starts

    @property
    def row_counts(self) -> Tensor:
        """(G, num_q_blocks) int64: kept KV blocks of each query block."""
        return self._blocks.counts

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """(nnz,) int64 each: group, query block and KV block of every kept block, in storage order."""
        return self._blocks.coordinates()

    def crosses_diagonal(self) -> Tensor:
        """(nnz,) bool: the kept blocks that causality cuts (all False where the layout is not causal)."""
        if not self.causal:
            return torch.zeros(self.nnz_blocks, dtype=torch.bool, device=self.device)
        _, row, col = self.coordinates()
        return self._kv.lasts[col] > self.q_block_starts[row]

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
        q, kv = whole_axes(q_len, kv_len, q_block_size, kv_block_size, row.device)
        return cls._whole(Csr.of_coordinates((group, row, col), num_groups, q.count, kv.count), q, kv, causal)

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
        q, kv = whole_axes(q_len, kv_len, q_block_size, kv_block_size, torch.empty(0, device=device).device)
        for lists in grouped:
            if len(lists) != q.count:
                raise ValueError(f"rows must list {q.count} query blocks (q_len / q_block_size), got {len(lists)}")
        listed = [(g, i, j) for g, lists in enumerate(grouped) for i, cols in enumerate(lists) for j in cols]
        index = torch.tensor(listed, dtype=torch.int64, device=device).reshape(-1, 3)
        return cls._whole(Csr.of_coordinates(index.unbind(1), len(grouped), q.count, kv.count), q, kv, causal)

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
        q, kv = whole_axes(q_len, kv_len, q_block_size, kv_block_size, mask.device)
        shape = (q.count, kv.count)
        if mask.dtype != torch.bool or mask.dim() not in (2, 3, 4) or tuple(mask.shape[-2:]) != shape:
            raise ValueError(f"mask must be bool (..., {shape[0]}, {shape[1]}), got {mask.dtype} {tuple(mask.shape)}")
        flat = mask.reshape(-1, *shape)
        return cls._whole(Csr.of_coordinates(flat.nonzero().unbind(1), len(flat), *shape), q, kv, causal)

    @classmethod
    def _whole(cls, blocks: Csr, q: Axis, kv: Axis, causal: bool) -> BlockLayout:
        """The layout of whole sequences that keeps the blocks which causality allows."""
        if causal:
            _, row, col = blocks.coordinates()
            blocks = blocks.where(kv.starts[col] <= q.lasts[row])
        return cls._of(blocks, q, kv, causal)

    def to_dense(self) -> Tensor:
        """(G, num_q_blocks, num_kv_blocks) bool. O(num_blocks**2) memory: for looking at small layouts."""
        sizes = (self.num_groups, self.num_q_blocks, self.num_kv_blocks)
        dense = torch.zeros(sizes, dtype=torch.bool, device=self.device)
        dense[self.coordinates()] = True
        return dense

    def to(self, device: torch.device | str) -> BlockLayout:
        """This layout on ``device``; itself where it is there already."""
        if self.device == torch.empty(0, device=device).device:
            return self
        blocks = Csr(self.crow_indices.to(device), self.col_indices.to(device), self.num_kv_blocks)
        return self._of(blocks, self._q.to(device), self._kv.to(device), self.causal)

    def validate(self) -> BlockLayout:
        """Checks the contents in O(nnz) and returns self.

        Raises:
            ValueError: offsets that do not ascend from 0 to nnz, a column out of range, columns not strictly ascending
                in a row, ids not strictly ascending or out of range, or a block above a causal layout's diagonal.
        """
        for part in (self._blocks, self._q, self._kv):
            part.validate()
        _, row, col = self.coordinates()
        if bool((col >= self.allowed_blocks[row]).any()):
            raise ValueError("a causal layout must hold no block above the diagonal")
        return self.trusted()

    def checked(self) -> BlockLayout:
        """Itself, validated where its contents were not yet, or were written to since."""
        return self if self.__dict__.get("_sound") == self.version else self.validate()

    def trusted(self) -> BlockLayout:
        """Itself, whose contents are right by construction: ``checked`` need not look at them."""
        self.__dict__["_sound"] = self.version
        return self

    # ---- operations --------------------------------------------------------------------------------------------

    def __or__(self, other: BlockLayout) -> BlockLayout:
        """The blocks of either. Groups broadcast (1 with G); geometry and causality must agree."""
        self._check_like(other)
        return self._of(self._blocks.union(other._blocks), self._q, self._kv, self.causal)

    def __and__(self, other: BlockLayout) -> BlockLayout:
        """The blocks of both."""
        self._check_like(other)
        return self._of(self._blocks.intersection(other._blocks), self._q, self._kv, self.causal)

    def _check_like(self, other: BlockLayout) -> None:
        if not isinstance(other, BlockLayout):
            raise TypeError(f"a layout combines with a BlockLayout, got {type(other).__name__}")
        for name in ("q_len", "kv_len", "q_block_size", "kv_block_size", "causal", "device"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"layouts must agree on {name}, got {getattr(self, name)} and {getattr(other, name)}")
        for name in ("q_block_starts", "kv_block_starts"):
            if not torch.equal(getattr(self, name), getattr(other, name)):
                raise ValueError(f"layouts must hold the same blocks, {name} differ")

    @overload
    def transpose(self, return_index: Literal[False] = False) -> BlockLayout: ...
    @overload
    def transpose(self, return_index: Literal[True]) -> tuple[BlockLayout, Tensor]: ...
    def transpose(self, return_index: bool = False) -> BlockLayout | tuple[BlockLayout, Tensor]:
        """Rows are KV blocks, columns are the query blocks that see them.

        Causality orders (query, key) pairs, so the transpose only lists blocks and is never ``causal`` itself.
        ``index`` (nnz,) int64 maps each block to its place in this layout: ``block_bias[index]`` follows.
        """
        blocks, index = self._blocks.transpose()
        flipped = self._of(blocks, self._kv, self._q, False)
        return (flipped, index) if return_index else flipped

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
        q, rows = self._q.keep(q_blocks)
        kv, columns = self._kv.keep(kv_blocks)
        blocks, index = self._blocks.select(rows, columns)
        selected = self._of(blocks, q, kv, self.causal)
        return (selected, index) if return_index else selected

    def repeat_heads(self, repeats: int) -> BlockLayout:
        """A layout per KV head as one per query head: every group ``repeats`` times in a row (as GQA shares heads)."""
        if repeats < 1:
            raise ValueError(f"repeats must be positive, got {repeats}")
        return self._of(self._blocks.repeat(repeats), self._q, self._kv, self.causal)

    def select_groups(self, groups: Tensor) -> tuple[BlockLayout, Tensor]:
        """The layout of the groups of these numbers (n,) int64, in this order, and (nnz,) int64 each kept block's place
        in this layout."""
        blocks, index = self._blocks.select_groups(groups)
        return self._of(blocks, self._q, self._kv, self.causal), index

    # ---- looking -----------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """A stable hash of geometry and contents, equal on every device and rank."""
        meta = (self.q_len, self.kv_len, self.q_block_size, self.kv_block_size, self.causal, self.num_groups)
        state = hashlib.sha256(repr(meta).encode())
        for tensor in (self.crow_indices, self.col_indices, self._q.all_ids, self._kv.all_ids):
            state.update(tensor.cpu().contiguous().numpy().tobytes())
        return state.hexdigest()[:32]

    def describe(self, group: int = 0, max_cells: int = 64) -> str:
        """A picture in text of one group: darker cells keep more of their blocks; ``·`` lies above the diagonal."""
        if not 0 <= group < self.num_groups:
            raise ValueError(f"group must lie in 0..{self.num_groups - 1}, got {group}")
        return "\n".join([str(self), *shades(*self.picture(group, max_cells))])

    def picture(self, group: int = 0, max_cells: int = 64) -> tuple[Tensor, Tensor]:
        """(rows, cols) int64 each, at most ``max_cells`` a side: kept and allowed blocks in each cell, on the CPU."""
        return cells(self._blocks.group(group), self.allowed_blocks, max_cells)

    def __str__(self) -> str:
        heads = "all heads share it" if self.num_groups == 1 else f"{self.num_groups} groups"
        return (
            f"BlockLayout: {self.q_len} x {self.kv_len} tokens, {self.num_q_blocks} x {self.num_kv_blocks} blocks of "
            f"{self.q_block_size} x {self.kv_block_size}, {heads}, {'causal' if self.causal else 'not causal'}, "
            f"{self.nnz_blocks} blocks kept, density {self.density:.2%}"
        )
