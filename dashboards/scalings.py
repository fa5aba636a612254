"""Strong and weak scaling as lines to draw: measured points, and the forecast for up to a thousand ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from dashboards.figures.ring_scaling import RingLine, RingPoint
from dashboards.wording import attention_label
from raybsa.experiments.forecast import RingRow, can_forecast, forecast
from raybsa.ring.hardware import Hardware
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec

STRONG, WEAK, WINDOW = 1 << 20, 1 << 16, 1 << 12  # tokens in all; tokens of a rank; tokens of a window that stays
_IDEAL = "Dotted: the ideal, one rank's time for the same work / ranks."
# Causal bf16 attention in blocks of 128, as a large model has it.
_LARGE = TrialSpec(
    "ring",
    (AttentionSpec("dense"),),
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    causal=True,
    dtype="bfloat16",
)


class Scaling(NamedTuple):
    """A figure's title, what it holds fixed in words, and its lines."""

    title: str
    told: str
    lines: list[RingLine]


def measured_scalings(rows: Sequence[RingRow], hardware: Hardware, most: int) -> list[Scaling]:
    """What was measured, carried on: a question's longest sequence over more ranks, 1M tokens, and its shortest
    one as the tokens of a rank. Families without statistics are left out."""
    groups: dict[AttentionSpec, list[RingRow]] = defaultdict(list)
    for row in rows:
        if can_forecast(row):
            groups[row.attention].append(row)
    strong, large, weak = [], [], []
    for of_question in groups.values():
        chosen = max(of_question, key=lambda row: (row.world_size > 1, row.record.partition == "balanced"))
        dealt = [r for r in of_question if r.world_size == 1 or r.record.partition == chosen.record.partition]
        longest, each = (pick(row.spec.seq_len for row in dealt) for pick in (max, min))
        line = _Lines(chosen.spec, hardware, most)
        fixed = [row for row in dealt if row.spec.seq_len == longest]
        grown = [row for row in dealt if row.spec.seq_len == each * row.world_size]
        strong.append(line.strong(longest, fixed))
        large.append(line.strong(STRONG, []))
        weak.append(line.weak(each, grown))
    return [
        Scaling("Strong scaling, as long as measured", f"The same sequence over more ranks. {_IDEAL}", strong),
        *_titled(large, weak),
    ]


def preset_scalings(hardware: Hardware, most: int) -> list[Scaling]:
    """Dense, a tenth of the past, and a window that does not grow, for 32 query and 8 KV heads x 128."""
    lines = []
    for family, density, window in (("dense", None, None), ("sink_window", 0.1, None), ("sink_window", None, WINDOW)):
        attention = AttentionSpec("distributed", PatternSpec(family), density, 128)
        lines.append(_Lines(replace(_LARGE, attention=(attention,)), hardware, most, window))
    return _titled([line.strong(STRONG, []) for line in lines], [line.weak(WEAK, []) for line in lines])


def _titled(strong: list[RingLine], weak: list[RingLine]) -> list[Scaling]:
    return [
        Scaling(f"Strong scaling, {_short(STRONG)} tokens", f"The same sequence over more ranks. {_IDEAL}", strong),
        Scaling("Weak scaling", f"A sequence that grows with the ranks. {_IDEAL}", weak),
    ]


class _Lines:
    """One question's lines. ``window``: tokens that stay, instead of a density."""

    def __init__(self, spec: TrialSpec, hardware: Hardware, most: int, window: int | None = None) -> None:
        self._spec, self._hardware, self._most = spec, hardware, most
        self._block = spec.layer(0).block_size
        self._window = None if window is None else window // self._block
        self._density = spec.layer(0).density if window is None else min(1.0, 2 * window / STRONG)
        name = attention_label(spec.layer(0)).replace("_", " ")
        self._name = name if window is None else f"{name} of {_short(window)}"

    def strong(self, tokens: int, measured: Sequence[RingRow]) -> RingLine:
        return self._line(_short(tokens), measured, lambda ranks: tokens)

    def weak(self, tokens: int, measured: Sequence[RingRow]) -> RingLine:
        return self._line(f"{_short(tokens)} a rank", measured, lambda ranks: tokens * ranks)

    def _line(self, size: str, measured: Sequence[RingRow], tokens: Callable[[int], int]) -> RingLine:
        """Forecasts for 1, 2, 4, ... ranks, as far as every rank has a block."""
        worlds = [1 << i for i in range(self._most.bit_length()) if tokens(1 << i) // self._block >= 1 << i]
        ahead = [self._ahead(world, tokens(world)) for world in worlds]
        return RingLine(f"{self._name}, {size}", self._density, sorted(map(_measured, measured)), ahead)

    def _ahead(self, world_size: int, seq_len: int) -> RingPoint:
        ring, alone = forecast(self._spec, self._hardware, world_size=world_size, seq_len=seq_len, window=self._window)
        return RingPoint(world_size, 1e3 * ring.forward_backward_s, 1e3 * alone.forward_backward_s)


def _measured(row: RingRow) -> RingPoint:
    record = row.record
    both, alone = record.forward_backward_ms_p50 or 0.0, record.single_forward_backward_ms_p50
    return RingPoint(row.world_size, both, alone, row.is_crowded)


def _short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens % (1 << 20) == 0 else f"{tokens >> 10}K"
