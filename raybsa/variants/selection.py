"""Selection: what a ``LayoutSource`` chose for one call. It lives in that call: threads share the source."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from raybsa.layout import BlockLayout


class Selection(NamedTuple):
    """The blocks that one call keeps.

    ``block_bias`` is (nnz,) or None. ``choice`` is the source's own: what it needs to complete this call. ``attn_mask``
    takes the place of the call's, where it is not None.
    """

    layout: BlockLayout
    block_bias: Tensor | None = None
    choice: Any = None
    attn_mask: Tensor | None = None
