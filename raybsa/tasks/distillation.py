"""distill: trains a selector alone, on the q and k of a model that stays as it is (SeerAttention, 2410.13276)."""

from __future__ import annotations

import math

import torch

from raybsa.tasks.capture import Captured
from raybsa.tasks.optimizer import AdamW
from raybsa.tasks.training import learning_rates
from raybsa.variants.selector import BlockSelector


def distill(
    selector: BlockSelector, call: Captured, steps: int, *, learning_rate: float = 1e-2, batch: int = 4
) -> list[float]:
    """Trains the gate in place to follow the whole attention of ``call``; returns the loss of each step, in nats.

    Args:
        selector: of the method ``"distill"``, with the call's heads.
        call: q and k of at least one sample.
        steps: of AdamW; each takes ``batch`` samples in turn and a few rows of each.

    Raises:
        ValueError: another method, or no sample.
    """
    if selector.method != "distill" or not len(call.q):
        raise ValueError(
            f"a selector of method 'distill' and at least one sample are needed, got {selector.method!r} and "
            f"{len(call.q)} samples"
        )
    scale = 1.0 / math.sqrt(call.q.shape[-1]) if call.scale is None else call.scale
    optimizer = AdamW(selector.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step, rate in enumerate(learning_rates(steps, learning_rate)):
        optimizer.param_groups[0]["lr"] = rate
        some = torch.arange(step * batch, step * batch + min(batch, len(call.q))) % len(call.q)
        loss = selector.divergence(call.q[some], call.k[some], scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        selector.step()
        losses.append(loss.item())
    return losses
