"""The cells of the ``gpu`` suite: one kernel call on one GPU, ours beside other libraries', as data.

B = 1, bf16, a layout a head; random blocks, a window with one global block, a window with one sink block, at about 1,
5, 10 and 50 %. Groups share their compiled kernels; a part of the suite takes every n-th group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raybsa.kernels.auto_table import OWN
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec

BASE = TrialSpec(
    "peers",
    (AttentionSpec("base", PatternSpec("random"), 0.1, 64, OWN),),
    seq_len=8192,
    num_layers=1,
    num_heads=16,
    head_dim=128,
    causal=False,
    dtype="bfloat16",
)
DENSITIES = (0.01, 0.05, 0.1, 0.5)


@dataclass(frozen=True)
class Cell:
    """A name (for ``--only``), the question to our kernels, and whether other libraries are asked too."""

    name: str
    group: str
    spec: TrialSpec
    peers: bool = True


def cells(*, quick: bool = False) -> list[Cell]:
    """All of them, or for ``quick`` head_dim 128 at 8K and 32K at 5 and 10 % only."""
    shapes = [(64, 8192, 128), *((128, tokens, block) for tokens in (8192, 32768, 131072) for block in (128, 64))]
    compared = [cell for shape in shapes for cell in _compared(*shape)]
    if not quick:
        return [*compared, *_own()]
    few = ("-5%", "-10%")
    return [c for c in compared if c.spec.head_dim == 128 and c.spec.seq_len <= 32768 and c.name.endswith(few)]


def parts_of(whole: Sequence[Cell], part: int, parts: int) -> list[Cell]:
    """Part 1 .. ``parts``: every ``parts``-th group of cells. Raises ValueError for a part that there is not."""
    if not 1 <= part <= parts:
        raise ValueError(f"a part is one of 1 .. {parts}, got {part}")
    groups = list(dict.fromkeys(cell.group for cell in whole))
    mine = set(groups[part - 1 :: parts])
    return [cell for cell in whole if cell.group in mine]


def _compared(head_dim: int, tokens: int, block: int) -> list[Cell]:
    base = replace(BASE, head_dim=head_dim, seq_len=tokens)
    group = f"d{head_dim}-{_short(tokens)}-b{block}"
    found: dict[TrialSpec, Cell] = {}
    for density in DENSITIES:
        for pattern, spec in (
            ("random", _asking(base, PatternSpec("random"), density, block)),
            ("global", _asking(base, window_global(tokens, block, density), None, block)),
        ):
            found.setdefault(spec, Cell(f"{group}-{pattern}-{density * 100:g}%", group, spec))
    sink = _asking(base, PatternSpec("sink_window", {"sink": 1}), max(0.01, 2 * block / tokens), block)
    found.setdefault(sink, Cell(f"{group}-sink-1%", group, sink))
    return list(found.values())


def _own() -> list[Cell]:
    """What no other library does, or none for training: small blocks, causal, shared KV heads, a million tokens."""
    at_32k, random = replace(BASE, seq_len=32768), PatternSpec("random")
    asked = {
        "b32-random-5%": _asking(at_32k, random, 0.05, 32),
        "b16-random-5%": _asking(at_32k, random, 0.05, 16),
        "b64-causal-random-5%": _asking(replace(at_32k, causal=True), random, 0.05, 64),
        "b64-causal-sink-5%": _asking(replace(at_32k, causal=True), PatternSpec("sink_window"), 0.05, 64),
        "b128-causal-random-5%": _asking(replace(at_32k, causal=True), random, 0.05, 128),
        "b64-4kv-random-5%": _asking(replace(at_32k, num_kv_heads=4), random, 0.05, 64),
        "b64-4kv-causal-sink-5%": _asking(
            replace(at_32k, num_kv_heads=4, causal=True), PatternSpec("sink_window"), 0.05, 64
        ),
    }
    found = [Cell(f"32K-{name}", "own", spec, peers=False) for name, spec in asked.items()]
    million = replace(BASE, seq_len=1 << 20, num_heads=8, head_dim=64)
    return [*found, Cell("1M-b64-random-1%", "own-1M", _asking(million, random, 0.01, 64), peers=False)]


def window_global(tokens: int, block: int, density: float) -> PatternSpec:
    """One global block and the window around the diagonal that comes nearest to a density in total."""
    blocks = tokens // block
    rest = blocks - 1  # rows and columns that are not global

    def missing(reach: int) -> float:
        return abs(2 * blocks - 1 + rest * (2 * reach + 1) - reach * (reach + 1) - density * blocks * blocks)

    reach = min(range(blocks), key=missing)
    window = {"name": "sliding_window", "params": {"window": (reach - 1) * block + 2 if reach else 1}}
    return PatternSpec("union", {"parts": [window, {"name": "global_blocks", "params": {"num_globals": 1}}]})


def _asking(base: TrialSpec, pattern: PatternSpec, density: float | None, block: int) -> TrialSpec:
    return replace(base, attention=(AttentionSpec("base", pattern, density, block, OWN),))


def _short(tokens: int) -> str:
    return f"{tokens >> 10}K"
