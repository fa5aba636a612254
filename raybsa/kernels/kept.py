"""What backends make once for a layout (plans, transposes, choices), found again by the layout's own tensors.

An operator of torch is given tensors, and a layout object may be gone while its tensors are part of a graph. So what
is kept belongs to the tensors: it lives as long as ``col_indices`` does, and is made anew once they are written to.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from raybsa.layout import BlockLayout

MOST = 512  # entries of one layout, of which most are decisions about calls of one signature
Kept = dict[tuple[object, ...], Any]
_WITH_TENSORS = WeakTensorKeyDictionary()  # of col_indices: a dictionary for each use of them
_WITH_ROWS = WeakTensorKeyDictionary()  # of the rows' offsets: a dictionary for each geometry


def kept_with(layout: BlockLayout) -> Kept:
    """What was made once for a layout."""
    version, found = layout.__dict__.get("_kept", (-1, None))
    if version != layout.version:
        found = {} if layout.transient else _of_tensors(layout).kept
        layout.__dict__["_kept"] = (layout.version, found)
    if len(found) > MOST:
        found.clear()
    return found


def offsets_decide_rows(layout: BlockLayout) -> bool:
    """Whether what a row sees of its blocks follows from the offsets of the rows, whatever the columns are: equal
    blocks of a whole sequence."""
    return layout.q_block_size == layout.kv_block_size and layout.q_block_ids is layout.kv_block_ids is None


def kept_with_rows(layout: BlockLayout) -> Kept:
    """What was made once from the offsets of the rows alone; ``kept_with`` where they do not decide.

    It lives as long as the tensor of the offsets: layouts that share it, as those of a selection do, share this.
    """
    version, found = layout.__dict__.get("_kept_with_rows", (-1, None))
    if version != layout.version:
        found = _of_rows(layout) if offsets_decide_rows(layout) else kept_with(layout)
        layout.__dict__["_kept_with_rows"] = (layout.version, found)
    if len(found) > MOST:
        found.clear()
    return found


def layout_of(
    crow_indices: Tensor, col_indices: Tensor, q_ids: Tensor | None, kv_ids: Tensor | None, sizes: tuple[int, ...]
) -> BlockLayout:
    """The layout of these tensors, checked, with what is kept with them.

    Args:
        sizes: q_len, kv_len, q_block_size, kv_block_size, causal and transient, as in ``BlockLayout``.

    Raises:
        ValueError: contents that are no layout.
    """
    q_len, kv_len, q_block_size, kv_block_size, causal, transient = sizes
    lengths = (q_len, kv_len, q_block_size, kv_block_size)
    layout = BlockLayout(crow_indices, col_indices, *lengths, bool(causal), q_ids, kv_ids, bool(transient))
    if layout.transient:
        return layout.checked()
    entry = _of_tensors(layout)
    if entry.layout is None:
        entry.layout = _alias(layout.checked())
        entry.layout.__dict__["_kept"] = (entry.layout.version, entry.kept)
    return entry.layout


class _Entry:
    """What is kept with one use of a ``col_indices``: ``others`` are weak references to its other tensors."""

    def __init__(self, others: tuple[Any, ...], layout: BlockLayout) -> None:
        self.others, self.version = others, layout.version
        self.kept: Kept = {}
        self.layout: BlockLayout | None = None  # of aliases, which do not keep the tensors alive

    def is_of(self, layout: BlockLayout) -> bool:
        theirs = (layout.crow_indices, layout.q_block_ids, layout.kv_block_ids)
        same = all((None if mine is None else mine()) is other for mine, other in zip(self.others, theirs, strict=True))
        return same and self.version == layout.version


def _of_rows(layout: BlockLayout) -> Kept:
    crow = layout.crow_indices
    sizes = (layout.q_len, layout.kv_len, layout.q_block_size, layout.causal, _version(crow))
    found: Kept = _WITH_ROWS.setdefault(crow, {}).setdefault(sizes, {})
    return found


def _of_tensors(layout: BlockLayout) -> _Entry:
    uses: dict[tuple[object, ...], _Entry] = _WITH_TENSORS.setdefault(layout.col_indices, {})
    key = (*layout.sizes, id(layout.crow_indices), id(layout.q_block_ids), id(layout.kv_block_ids))
    found = uses.get(key)
    if found is None or not found.is_of(layout):
        others = (layout.crow_indices, layout.q_block_ids, layout.kv_block_ids)
        found = uses[key] = _Entry(tuple(None if x is None else ref(x) for x in others), layout)
    return found


def _alias(layout: BlockLayout) -> BlockLayout:
    """The same layout on tensors of its own over the same memory."""
    tensors = (layout.crow_indices, layout.col_indices, layout.q_block_ids, layout.kv_block_ids)
    crow, col, q_ids, kv_ids = (None if x is None else x.detach() for x in tensors)
    assert crow is not None
    assert col is not None
    return BlockLayout(crow, col, *layout.sizes, q_ids, kv_ids).trusted()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
