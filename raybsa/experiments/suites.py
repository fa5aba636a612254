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


# A causal layer of 4 heads x 64 with 2 KV heads: what a CPU core computes in a fraction of a second.
RING = TrialSpec(
    "ring", (AttentionSpec("dense"),), seq_len=4096, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, causal=True
)


def ring() -> list[TrialSpec]:
    """The ring on processes of this host, 1, 2 and 4 ranks: lengths, densities, partitions and families."""
    asked = [
        *((length, "sink_window", 0.1, "balanced") for length in (2048, 4096, 8192)),
        *((4096, "sink_window", density, "balanced") for density in (0.03, 0.3)),
        *((4096, "sink_window", 0.1, partition) for partition in ("contiguous", "zigzag")),
        (4096, "random", 0.1, "balanced"),
        (4096, "dense", None, "zigzag"),
    ]
    return _rings(RING, asked, (1, 2, 4), block_size=64)


def ring_quick() -> list[TrialSpec]:
    """Seconds: to see that everything runs."""
    base = replace(RING, num_heads=2, head_dim=16)
    asked = [(length, "sliding_window", 0.2, "balanced") for length in (512, 1024)]
    return _rings(base, asked, (1, 2), block_size=32)


def ring_gpu() -> list[TrialSpec]:
    """bf16, 32 query and 8 KV heads x 128, block 128, on 1 and 2 GPUs: the rows of docs/ring.md."""
    base = replace(RING, num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    window = [(16384, 0.136), (16384, 0.05), (32768, 0.1), (65536, 0.106), (131072, 0.05), (131072, 0.01)]
    asked = [
        *((length, "sink_window", density, "balanced") for length, density in window),
        *((length, "dense", None, "zigzag") for length in (16384, 32768, 65536, 131072)),
    ]
    return _rings(base, asked, (1, 2), block_size=128)


def _rings(
    base: TrialSpec, asked: Sequence[tuple[int, str, float | None, str]], worlds: Sequence[int], *, block_size: int
) -> list[TrialSpec]:
    """Every (tokens, family, density, partition) on every number of ranks."""
    specs = [
        replace(
            base, seq_len=length, attention=(AttentionSpec("distributed", PatternSpec(family), density, block_size),)
        )
        for length, family, density, _ in asked
    ]
    partitions = [partition for *_, partition in asked]
    return on_ranks([*zip(specs, partitions, strict=True)], worlds)


def on_ranks(asked: Sequence[tuple[TrialSpec, str]], worlds: Sequence[int]) -> list[TrialSpec]:
    """Each question with its partition on every number of ranks; alone, all partitions are one."""
    specs = [
        replace(
            spec, task="ring", task_params={"world_size": world, "partition": partition if world > 1 else "balanced"}
        )
        for world in worlds
        for spec, partition in asked
    ]
    return list(dict.fromkeys(specs))


# A byte model whose matrices are wide enough for factors to be small: 0.85 M parameters.
COMPRESSION = TrialSpec(
    "compression",
    (AttentionSpec("dense"),),
    train_len=64,
    train_steps=1000,
    learning_rate=2e-3,
    num_layers=1,
    num_heads=4,
    head_dim=64,
)
CODECS: tuple[tuple[str, dict[str, int | float | str], int], ...] = (
    ("none", {}, 0),
    ("powersgd", {"rank": 8}, 0),
    ("powersgd", {"rank": 2}, 0),
    ("powersgd", {"rank": 32, "wire": "int8"}, 0),
    ("powersgd", {"rank": 9, "wire": "int8"}, 0),
    ("torch_powersgd", {"rank": 8}, 2),
    ("torch_powersgd", {"rank": 2}, 2),
    ("topk", {"density": 0.02}, 0),
    ("topk", {"density": 0.005}, 0),
)


def compression(base: TrialSpec = COMPRESSION, *, seeds: int = 3, world_size: int = 2) -> list[TrialSpec]:
    """A training for each codec and seed, uncompressed first; 4 windows a step, which the ranks share."""
    return [
        replace(
            base,
            seed=seed,
            task_params={
                "codec": {"name": name, "params": params},
                "warmup_steps": warmup,
                "world_size": world_size,
                "train_batch": 4,
            },
        )
        for seed in range(seeds)
        for name, params, warmup in CODECS
    ]


RING_GPU = "ring-gpu"
SUITES = {"cpu": cpu, "quick": quick, "ring": ring, "ring-quick": ring_quick, RING_GPU: ring_gpu}
