"""LayoutSource: where a variant's layouts come from; and FixedPattern, a rule that does not look at the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from raybsa import patterns
from raybsa.aside import shape_of
from raybsa.axis import check_geometry
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.ordinary import has_numbers, has_one_layout
from raybsa.layout import BlockLayout
from raybsa.patterns.pattern import Pattern
from raybsa.patterns.written import WrittenRule
from raybsa.spec import ADAPTIVE, PatternSpec
from raybsa.variants.selection import Selection
from raybsa.variants.selector import BlockSelector

DEFAULT_PATTERN = "sliding_window"
DEFAULT_DENSITY = 0.1

PatternLike = Pattern | PatternSpec | Mapping[str, Any] | str


class LayoutSource(Protocol):
    """Says which blocks a call keeps. A learned source is an nn.Module and brings its own parameters."""

    def select(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None = None,
        segment_ids: tuple[Tensor, Tensor] | None = None,
    ) -> Selection:
        """The layout for q (B, H, Sq, D) and k (B, Hkv, Skv, D), on q's device, and (nnz,) ``block_bias`` or None.

        ``attn_mask`` and ``segment_ids`` are the call's: what they hide from a token may not decide on its blocks. The
        call attends by the selection's own ``attn_mask`` where it has one.
        """
        ...

    @property
    def causal(self) -> bool:
        """Whether query i sees key j only if ``j <= i``."""
        ...

    def complete(self, selection: Selection, call: AttentionCall, out: Tensor) -> Tensor:
        """The variant's output, from that of the attention over the selected blocks."""
        ...

    def layout(self, q_len: int, kv_len: int, num_heads: int, device: torch.device) -> BlockLayout:
        """The layout as far as it is known without data: of a learned source only how many blocks each row keeps."""
        ...


class FixedPattern:
    """One rule for every input: the layout depends on lengths, heads and device alone, and is cached.

    Args:
        pattern: a rule, its PatternSpec or that spec's dict, or a family's name.
        density: share of the allowed blocks to keep, in (0, 1]; None keeps what the rule gives by itself. A sequence
            too short for it keeps the smallest member of the family.
        block_size: tokens of a query and of a KV block, a power of two.
        causal: query i sees key j only if ``j <= i``.
        cache_size: layouts to keep at hand.

    Raises:
        ValueError, TypeError: an unknown pattern or parameter, a density or block size out of range, or a density
            beside a parameter that it sets.
    """

    def __init__(
        self,
        pattern: PatternLike,
        *,
        density: float | None = None,
        block_size: int = 64,
        causal: bool = False,
        cache_size: int = 16,
    ) -> None:
        check_geometry(1, 1, block_size, block_size)
        self.rule = patterns.build(pattern)
        self.density = None if density is None else self.rule.check(density)
        self.block_size = block_size
        self.causal = causal
        self.written = WrittenRule(self.rule, self.density, block_size, causal, cache_size)

    def select(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None = None,
        segment_ids: tuple[Tensor, Tensor] | None = None,
    ) -> Selection:
        """The rule's layout at these lengths, and no bias; it looks at no mask.

        Under ``torch.compile`` the written rule stands for its layout: the operator asks it when it runs. An exported
        program holds the layout itself, where its lengths are known.
        """
        if torch.compiler.is_compiling() and not has_one_layout(q, k):
            return Selection(cast("BlockLayout", self.written))
        shape = shape_of(q)
        device = q.device if has_numbers(q) else torch.device("cpu")
        return Selection(self.written.layout(shape[2], shape_of(k)[2], shape[1], device))

    def complete(self, selection: Selection, call: AttentionCall, out: Tensor) -> Tensor:
        """The output as it is."""
        return out

    def layout(self, q_len: int, kv_len: int, num_heads: int, device: torch.device) -> BlockLayout:
        """The rule's layout, from the cache where it is there."""
        return self.written.layout(q_len, kv_len, num_heads, device)

    def __repr__(self) -> str:
        density = "" if self.density is None else f", density={self.density:g}"
        return f"pattern={self.rule}{density}, block_size={self.block_size}, causal={self.causal}"


def layout_source(
    pattern: PatternLike | None,
    segment_lengths: Sequence[int] | None,
    dilation_rates: Sequence[int] | None,
    *,
    density: float | None,
    block_size: int,
    causal: bool,
    num_heads: int | None,
    head_dim: int | None,
    num_kv_heads: int | None = None,
) -> FixedPattern | BlockSelector:
    """The source that a variant's arguments ask for: a ``BlockSelector`` where the pattern is named "adaptive" (its
    options are the pattern's parameters), else as ``fixed_pattern``, which does not ask for heads."""
    options = adaptive_options(pattern)
    if options is None:
        return fixed_pattern(
            pattern, segment_lengths, dilation_rates, density=density, block_size=block_size, causal=causal
        )
    if num_heads is None or head_dim is None:
        raise ValueError(
            f"the adaptive pattern needs num_heads and head_dim, for its parameters: got {num_heads} and {head_dim}"
        )
    return BlockSelector(
        num_heads,
        head_dim,
        num_kv_heads=num_kv_heads,
        segment_lengths=segment_lengths,
        dilation_rates=dilation_rates,
        density=DEFAULT_DENSITY if density is None else density,
        block_size=block_size,
        causal=causal,
        **options,
    )


def adaptive_options(pattern: PatternLike | None) -> dict[str, Any] | None:
    """The parameters of a pattern that is named "adaptive"; None where it is another."""
    if isinstance(pattern, Mapping):
        pattern = PatternSpec.from_dict(pattern)
    if isinstance(pattern, PatternSpec):
        return dict(pattern.params) if pattern.name == ADAPTIVE else None
    return {} if pattern == ADAPTIVE else None


def fixed_pattern(
    pattern: PatternLike | None,
    segment_lengths: Sequence[int] | None,
    dilation_rates: Sequence[int] | None,
    *,
    density: float | None,
    block_size: int,
    causal: bool,
) -> FixedPattern:
    """The source that a variant's arguments ask for.

    ``segment_lengths`` and ``dilation_rates`` together mean the dilated pattern. Where neither they nor ``pattern`` is
    given it is a sliding window, at density 0.1 unless ``density`` says otherwise.

    Raises:
        ValueError: both ways to name a pattern at once, or one of the two lists alone.
    """
    lists = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
    given = [name for name, value in lists.items() if value is not None]
    if given and pattern is not None:
        raise ValueError(f"pattern or segment_lengths and dilation_rates must be given, got both: pattern and {given}")
    if len(given) == 1:
        raise ValueError(f"segment_lengths and dilation_rates go together, got only {given[0]}")
    if given:
        pattern = PatternSpec("dilated", lists)
    elif pattern is None:
        pattern, density = DEFAULT_PATTERN, DEFAULT_DENSITY if density is None else density
    return FixedPattern(pattern, density=density, block_size=block_size, causal=causal)
