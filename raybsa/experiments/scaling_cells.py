"""The cells of the ``scaling`` suite as data: what is asked of each number of ranks, the most important first.

Strong scaling is one sequence over more ranks, weak scaling a sequence that grows with them; a window with a sink at 5
and 1 %, and dense, all causal. Beside our ring stand torch's: its dense ring, and FlexAttention over gathered K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.ring import RING, RING_LONGEST, RING_PEERS
from raybsa.tasks.ring_peers import FLASH, TORCH_FLEX

STRONG, WEAK, BOTH, LONGEST = "strong", "weak", "both", "longest"  # both: where the ranks share what would be theirs
OWN, CUDNN_RING, FLASH_RING = "auto", "torch-cp-cudnn", "torch-cp-flash"
DENSITIES = (0.05, 0.01)
DENSE = 1.0
MOST_RANKS = 8

# FLOP/s at which a rank surely computes, to tell beforehand what a cell may take; no result depends on them.
_SURE_RATE = {"cuda": 2.5e14, "cpu": 1.5e10}
_PRODUCTS = 9  # of a forward (2), and of a forward and backward (2 + 5)
_RING_ROUNDS, _SINGLE_ROUNDS = 7, 4  # how often a cell takes each at least: check, three rounds, bytes, memory
_START_S = {"cuda": 4.0, "cpu": 0.2}  # plan, inputs and our compilation
_FLEX_START_S = 15.0  # torch's compilation besides


@dataclass(frozen=True)
class Sizes:
    """How large the suite's questions are.

    Args:
        base: heads, head_dim and dtype of every question.
        block_size: tokens of a block.
        strong: tokens of the sequence that is shared.
        weak: tokens of a rank.
    """

    base: TrialSpec
    block_size: int
    strong: int
    weak: int


@dataclass(frozen=True)
class Cell:
    """A question to so many ranks of a device, and which scaling it belongs to."""

    scaling: str
    spec: TrialSpec
    device: str

    @property
    def world_size(self) -> int:
        return int(self.spec.task_params["world_size"])

    @property
    def backend(self) -> str:
        return self.spec.layer(0).backend

    @property
    def density(self) -> float:
        """What was asked for; what is kept is in the row."""
        return self.spec.layer(0).density or DENSE

    @property
    def name(self) -> str:
        kept = "dense" if self.density == DENSE else f"{self.density:.0%}"
        who = "" if self.backend == OWN else f" {self.backend}"
        return f"{self.scaling} {short(self.spec.seq_len)} {kept} on {self.world_size}{who}"

    @property
    def seconds(self) -> float:
        """About the least that the cell takes, from its arithmetic alone."""
        spec = self.spec
        pairs = spec.seq_len**2 / 2 * self.density * spec.batch * spec.num_heads
        single = _SINGLE_ROUNDS if spec.task == RING and spec.task_params["single"] else 0
        rounds = _RING_ROUNDS / self.world_size + single
        start = _START_S[self.device] + (_FLEX_START_S if self.backend == TORCH_FLEX else 0.0)
        return start + 2 * _PRODUCTS * pairs * spec.head_dim * rounds / _SURE_RATE[self.device]


_GPU = TrialSpec(
    RING,
    (AttentionSpec("dense"),),
    num_layers=1,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    causal=True,
    dtype="bfloat16",
)
_CPU = replace(_GPU, num_heads=4, num_kv_heads=2, head_dim=64, dtype="float32")
SIZES = {"cuda": Sizes(_GPU, 128, 1 << 17, 1 << 16), "cpu": Sizes(_CPU, 64, 8192, 4096)}
QUICK = {
    "cuda": Sizes(_GPU, 128, 1 << 14, 1 << 13),
    "cpu": Sizes(replace(_CPU, num_heads=2, num_kv_heads=1, head_dim=16), 32, 1024, 512),
}


def worlds_of(devices: int) -> list[int]:
    """1, 2, 4 and 8 ranks, as far as every rank has a core or GPU: the most first, then one, then the rest."""
    worlds = [1 << i for i in range(4) if 1 << i <= min(devices, MOST_RANKS)]
    return list(dict.fromkeys([worlds[-1], 1, *reversed(worlds)]))


def cells(sizes: Sizes, world_size: int, device: str, worlds: Sequence[int]) -> list[Cell]:
    """What is asked of ``world_size`` ranks, the most important first; one device also what dense flash attention takes
    at every length of all ``worlds``."""

    def cell(scaling: str, density: float, backend: str = OWN) -> Cell:
        tokens = sizes.strong if scaling == STRONG else sizes.weak * world_size
        single = tokens == sizes.strong or density < DENSE or world_size == 1
        spec = question(sizes, tokens, world_size, density, backend, single=single)
        return Cell(BOTH if sizes.weak * world_size == sizes.strong else scaling, spec, device)

    five, one = DENSITIES
    asked = [cell(scaling, five) for scaling in (WEAK, STRONG)]
    asked += [cell(STRONG, DENSE), cell(STRONG, DENSE, CUDNN_RING)]
    asked += [cell(STRONG, DENSE, FLASH)] if world_size == 1 else []
    asked += [cell(STRONG, five, TORCH_FLEX)]
    asked += [cell(scaling, one) for scaling in (WEAK, STRONG)]
    asked += [cell(WEAK, five, TORCH_FLEX), cell(STRONG, one, TORCH_FLEX), cell(STRONG, DENSE, FLASH_RING)]
    asked += [cell(WEAK, DENSE), cell(WEAK, DENSE, CUDNN_RING), cell(WEAK, one, TORCH_FLEX)]
    if world_size == 1:
        lengths = (sizes.weak * world for world in sorted(worlds))
        asked += [Cell(WEAK, question(sizes, tokens, 1, DENSE, FLASH), device) for tokens in lengths]
    first: dict[TrialSpec, Cell] = {}
    for found in asked:
        first.setdefault(found.spec, found)
    return list(first.values())


def longest_cell(sizes: Sizes, tokens: int, world_size: int, device: str) -> Cell:
    """Whether a step of so many tokens at the least density fits into the ranks' memory."""
    spec = question(sizes, tokens, world_size, DENSITIES[-1], OWN, single=False)
    params = {**spec.task_params, "partition": "zigzag"}
    return Cell(LONGEST, replace(spec, task=RING_LONGEST, task_params=params), device)


def question(
    sizes: Sizes, tokens: int, world_size: int, density: float, backend: str, *, single: bool = True
) -> TrialSpec:
    """The trial of one cell: of our ring (``auto``), or of another library by its name."""
    dense, own = density == DENSE, backend == OWN
    pattern = PatternSpec("dense" if dense else "sink_window")
    attention = AttentionSpec("distributed", pattern, None if dense else density, sizes.block_size, backend)
    params = {"world_size": world_size, "partition": "zigzag" if dense else "balanced", "single": single and own}
    task = RING if own else RING_PEERS
    return replace(sizes.base, task=task, seq_len=tokens, attention=(attention,), task_params=params)


def short(tokens: int) -> str:
    """Tokens as they are said: 512, 128K, 1.50M."""
    if tokens < 1024:
        return str(tokens)
    return f"{tokens >> 10}K" if tokens < 1 << 20 else f"{tokens / (1 << 20):.2f}M"
