"""Named benchmarks: the questions of ``jobs/benchmark.py``, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec

# One fp32 layer of 8 heads x 64; the error is measured where a float64 dense reference fits.
BASE = TrialSpec(
    "speed",
    (AttentionSpec("dense"),),
    seq_len=8192,
    num_layers=1,
    num_heads=8,
    head_dim=64,
    causal=False,
    task_params={"error_len": 1024},
)


def grid(
    base: TrialSpec,
    *,
    variants: Sequence[str],
    patterns: Sequence[PatternSpec],
    lengths: Sequence[int],
    densities: Sequence[float],
    block_size: int,
    backend: str = "auto",
) -> list[TrialSpec]:
    """Every combination, shortest lengths first, so that mistakes show early."""
    return [
        replace(base, seq_len=length, attention=(AttentionSpec(variant, pattern, density, block_size, backend),))
        for length in sorted(lengths)
        for variant in variants
        for pattern in patterns
        for density in densities
    ]


def cpu() -> list[TrialSpec]:
    """The CPU table of the README: 2K to 8K tokens at 10 %, 3 % and one block a row, FlexAttention beside it at 8K."""
    random, window = [PatternSpec("random")], [PatternSpec("sliding_window")]
    of = partial(grid, BASE, block_size=64)
    return [
        *of(variants=["base"], patterns=random, lengths=(2048, 4096, 8192), densities=(0.1, 0.03)),
        *of(variants=["base"], patterns=random, lengths=(8192,), densities=(1 / 128,)),
        *of(variants=["base"], patterns=window, lengths=(8192,), densities=(0.1, 0.03)),
        *of(variants=["multihead"], patterns=random, lengths=(2048, 8192), densities=(0.1,)),
        *of(variants=["base"], patterns=random, lengths=(8192,), densities=(0.1, 0.03), backend="flex"),
    ]


def quick() -> list[TrialSpec]:
    """Seconds: to see that everything runs."""
    base = replace(BASE, num_heads=2, head_dim=16, task_params={"error_len": 256})
    families = [PatternSpec("sliding_window"), PatternSpec("bigbird")]
    return grid(base, variants=["base"], lengths=(512, 1024), patterns=families, densities=(0.2,), block_size=32)


SUITES = {"cpu": cpu, "quick": quick}
