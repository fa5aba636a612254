"""Planted attention: each query block has one KV block that holds its attention, and means alone do not show which.

    python -m raybsa.tasks.planted        # recall of the planted block, before and after distillation

Every block has a code of a few channels, which its keys carry with alternating signs, and so do the queries of the
block that looks for it: a query and a key of equal signs meet. The mean of such keys is nothing; their maximum is the
code. So a gate that compares means finds nothing, and must learn to read the maxima. Which block belongs to which row
is drawn for each sample and head.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from raybsa.counter import Stream, hash_u32, normal
from raybsa.layout import BlockLayout
from raybsa.tasks.capture import Captured
from raybsa.tasks.distillation import distill
from raybsa.variants.selector import BlockSelector

_ACTIVE = 4  # channels of a code
_STRENGTH, _NOISE = 1.6, 0.1


def planted(
    seed: int, *, batch: int, heads: int, blocks: int, block_size: int, head_dim: int, causal: bool
) -> tuple[Captured, Tensor]:
    """q and k (batch, heads, blocks * block_size, head_dim), v = k, and (batch, heads, blocks) int64: the KV block
    planted for each query block; -1 for the first quarter of a causal problem's rows: too few blocks are theirs."""
    b, h, i = (torch.arange(n).view(s) for n, s in ((batch, (-1, 1, 1)), (heads, (1, -1, 1)), (blocks, (1, 1, -1))))
    target = hash_u32(seed, Stream.TASK, b, h, i) % (i.clamp(min=1) if causal else blocks)
    channel = torch.arange(head_dim).view(1, 1, 1, -1)
    order = hash_u32(seed, Stream.KEY, b[..., None], h[..., None], i[..., None], channel).argsort(-1)
    codes = torch.zeros(batch, heads, blocks, head_dim).scatter_(-1, order[..., :_ACTIVE], _STRENGTH)
    asked = codes.gather(2, target[..., None].expand_as(codes))
    sign = 1.0 - 2.0 * (torch.arange(block_size) % 2)
    q, k = (x[..., None, :] * sign[:, None] for x in (asked, codes))
    k = k.flatten(2, 3) + _NOISE * normal(
        seed,
        Stream.VALUE,
        *(x[..., None] for x in (b, h, torch.arange(blocks * block_size).view(1, 1, -1))),
        channel,
    )
    return Captured(q.flatten(2, 3), k, k, causal, scale=1.0), target.masked_fill((i < blocks // 4) & causal, -1)


def planted_recall(layout: BlockLayout, target: Tensor) -> Tensor:
    """(batch, heads): the share of rows with a planted block whose layout keeps it."""
    kept = layout.to_dense().unflatten(0, target.shape[:2])
    found = kept.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    asked = target >= 0
    return (found & asked).sum(-1) / asked.sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--causal", action="store_true")
    arguments = parser.parse_args()
    sizes = {"heads": 4, "blocks": 64, "block_size": 16, "head_dim": 32, "causal": arguments.causal}
    lesson, _ = planted(0, batch=8, **sizes)
    test, target = planted(1, batch=4, **sizes)
    options = {"density": arguments.density, "block_size": 16, "causal": arguments.causal, "sinks": 0, "window": 1}
    for method in ("mean-pool", "distill"):
        selector = BlockSelector(4, 32, method=method, **options)
        steps = (0, arguments.steps) if method == "distill" else (0,)
        for count in steps:
            if count:
                distill(selector, lesson, count)
            recall = planted_recall(selector.eval().select(test.q, test.k)[0], target)
            selector.train()
            print(
                f"{method}, {count} steps: recall of the planted block {recall.mean():.3f}, "
                f"worst head and sample {recall.min():.3f}"
            )


if __name__ == "__main__":
    main()
