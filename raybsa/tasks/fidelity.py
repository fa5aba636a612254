"""How much of dense attention a pattern keeps, on a model's own q, k and v: recall of its mass, and the output's error.

    python -m raybsa.tasks.fidelity qkv.pt --pattern sliding_window bigbird adaptive --density 0.05 0.1 --block-size 16

The file comes from ``raybsa.tasks.capture``. Beside every pattern stands the oracle: of each row the blocks with the
most mass, the best that any choice of so many blocks a row can do. "adaptive" is distilled on the first samples of each
call and judged, as all others, on the last.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raybsa.kernels.api import block_sparse_attention, run_call
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.mass import block_mass
from raybsa.layout import BlockLayout
from raybsa.selectors.rules import Rules
from raybsa.selectors.shape import Shape
from raybsa.selectors.topk import top_columns
from raybsa.spec import PatternSpec
from raybsa.tasks.capture import Captured, load_calls
from raybsa.tasks.distillation import distill
from raybsa.variants.selector import BlockSelector
from raybsa.variants.source import FixedPattern, adaptive_options

ORACLE = "oracle"


@dataclass(frozen=True)
class Fidelity:
    """How well one layout stands for dense attention.

    Args:
        name: of the pattern.
        density: kept / allowed blocks.
        recall: share of the attention's mass that lies in kept blocks, mean over samples and heads.
        worst_recall: the lowest of a sample and head.
        output_error: Frobenius norm of the difference to the dense output over that of the dense output.
    """

    name: str
    density: float
    recall: float
    worst_recall: float
    output_error: float


class DenseTruth:
    """What dense attention does with a call: the mass of its blocks and its output. O(num_blocks**2) numbers a head.

    Args:
        call: q, k and v.
        block_size: tokens.
    """

    def __init__(self, call: Captured, block_size: int) -> None:
        self.call, self.block_size = call, block_size
        (batch, heads), (q_len, kv_len) = call.q.shape[:2], (call.q.shape[2], call.k.shape[2])
        self.scale = 1.0 / math.sqrt(call.q.shape[-1]) if call.scale is None else call.scale
        self.rules = Rules(block_size, call.causal, sinks=0, window=1)
        layout = Shape.make(self.rules, q_len, kv_len, 1.0, call.q.device).everything(batch * heads)
        attention = AttentionCall(
            call.q, call.k, call.v, layout, self.scale, None, None, None, 0.0, None, False, return_lse=True
        )
        with torch.no_grad():
            self.out, lse = run_call(attention)
        shape = (layout.num_groups, layout.num_q_blocks, layout.num_kv_blocks)
        mass = torch.zeros(shape, dtype=lse.dtype, device=lse.device)
        self.mass = mass.index_put(layout.coordinates(), block_mass(attention, lse))

    def judge(self, name: str, layout: BlockLayout) -> Fidelity:
        """The fidelity of a layout with 1, H or B * H groups."""
        groups, batch = len(self.mass), self.call.q.shape[0]
        kept = layout.to_dense()
        kept = kept.repeat(batch, 1, 1) if layout.num_groups not in (1, groups) else kept
        recall = (self.mass * kept).sum((1, 2)) / self.mass.sum((1, 2))
        with torch.no_grad():
            out = block_sparse_attention(self.call.q, self.call.k, self.call.v, layout, scale=self.scale)
        assert isinstance(out, Tensor)
        error = torch.linalg.norm((out - self.out).double()) / torch.linalg.norm(self.out.double())
        return Fidelity(name, layout.density, float(recall.mean()), float(recall.min()), float(error))

    def oracle(self, density: float) -> BlockLayout:
        """The layout, one for each sample and head, that keeps the most mass at a density, and every diagonal."""
        shape = Shape.make(self.rules, self.call.q.shape[2], self.call.k.shape[2], density, self.mass.device)
        best = top_columns(self.rules.preferences(self.mass, shape.rows), shape.widest)
        return shape.layout(shape.columns_of(best[None]))


def fidelities(
    call: Captured,
    patterns: Sequence[PatternSpec],
    densities: Sequence[float],
    block_size: int,
    steps: int = 300,
    held_out: int = 1,
) -> Iterator[Fidelity]:
    """The oracle and every pattern at every density, on the last ``held_out`` samples of a call.

    Args:
        patterns: rules, or "adaptive" with the options of ``BlockSelector``, which is distilled in ``steps`` steps on
            the samples before these; "adaptive" with the method "mean-pool" needs none.
    """
    judged, lesson = part(call, slice(-held_out, None)), part(call, slice(None, -held_out))
    truth = DenseTruth(judged, block_size)
    for density in densities:
        yield truth.judge(ORACLE, truth.oracle(density))
        for spec in patterns:
            method = (adaptive_options(spec) or {}).get("method", "distill")
            name = spec.name if method == "distill" else f"{spec.name} ({method})"
            yield truth.judge(name, chosen_layout(spec, density, block_size, judged, lesson, steps))


def part(call: Captured, samples: slice | list[int]) -> Captured:
    """Some of a call's samples."""
    return replace(call, q=call.q[samples], k=call.k[samples], v=call.v[samples])


def chosen_layout(
    spec: PatternSpec, density: float | None, block_size: int, judged: Captured, lesson: Captured, steps: int
) -> BlockLayout:
    """What a rule keeps of ``judged``; a learned one that must be distilled learns from ``lesson`` in so many steps."""
    options = adaptive_options(spec)
    if options is None:
        source = FixedPattern(spec, density=density, block_size=block_size, causal=judged.causal)
        return source.select(judged.q, judged.k)[0]
    if density is None:
        raise ValueError("a learned pattern keeps a share of the blocks: a density was wanted, got none")
    selector = selector_for(judged, density, block_size, options)
    if selector.method == "distill":
        distill(selector, lesson, steps)
    return selector.eval().select(judged.q, judged.k)[0]


def selector_for(call: Captured, density: float, block_size: int, options: dict) -> BlockSelector:
    """A fresh selector for the heads of a call."""
    heads, kv_heads, head_dim = call.q.shape[1], call.k.shape[1], call.q.shape[3]
    return BlockSelector(
        heads,
        head_dim,
        num_kv_heads=kv_heads,
        density=density,
        block_size=block_size,
        causal=call.causal,
        **options,
    )


def main() -> int:
    arguments = _arguments()
    specs = [
        PatternSpec.from_dict(json.loads(text)) if text.startswith("{") else PatternSpec(text)
        for text in arguments.pattern
    ]
    for number, call in enumerate(load_calls(arguments.file)):
        call = replace(call, causal=call.causal or arguments.causal)
        print(f"call {number}: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}, causal={call.causal}")
        print(f"{'pattern':<18} {'kept':>7} {'recall':>7} {'worst':>7} {'of oracle':>9} {'output error':>12}")
        oracle = 1.0
        for row in fidelities(
            call, specs, arguments.density, arguments.block_size, arguments.steps, arguments.held_out
        ):
            oracle = row.recall if row.name == ORACLE else oracle
            print(
                f"{row.name:<18} {row.density:>7.2%} {row.recall:>7.2%} {row.worst_recall:>7.2%} "
                f"{row.recall / oracle:>9.2%} {row.output_error:>12.4f}",
                flush=True,
            )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("file", help="calls saved by raybsa.tasks.capture.save_calls")
    parser.add_argument("--pattern", nargs="+", default=["sliding_window", "sink_window", "bigbird", "adaptive"])
    parser.add_argument("--density", nargs="+", type=float, default=[0.05, 0.1])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--causal", action="store_true", help="where the file does not say so")
    parser.add_argument("--steps", type=int, default=300, help="of distillation, for adaptive")
    parser.add_argument("--held-out", type=int, default=1, help="samples at the end that all are judged on")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
