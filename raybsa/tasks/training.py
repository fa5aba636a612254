"""Training a task's model: one step, and the loop over steps that lets a timing neighbour in between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybsa.timing import DeviceLock
from raybsa.variants.selector import selector_loss, step_schedules

IGNORE = -100
_WARMUP_SHARE = 0.1
_CURVE_POINTS = 50

Batches = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Quality:
    """What training led to. ``goal`` is ``"min"`` or ``"max"``; ``curves`` are (name, step, value).

    ``train_seconds`` counts the steps themselves, not the waits for a neighbour that was timing.
    """

    name: str
    goal: str
    value: float
    train_seconds: float
    curves: tuple[tuple[str, int, float], ...]


def prepare(model: nn.Module, device: torch.device, dtype: str) -> tuple[nn.Module, AbstractContextManager]:
    """The model on its device, and the context to run it in: bfloat16 trains float32 weights under autocast."""
    if dtype == "float16":
        raise ValueError("quality trains in float32, float64 or bfloat16, got float16; time it with task 'speed'")
    if dtype == "bfloat16":
        return model.to(device), torch.autocast(device.type, torch.bfloat16)
    return model.to(device, getattr(torch, dtype)), nullcontext()


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    lock: DeviceLock,
    context: AbstractContextManager,
) -> tuple[float, tuple[tuple[str, int, float], ...]]:
    """Trains with AdamW, a linear warm-up and a cosine to a tenth; returns seconds and the loss curve (nats a token).

    Args:
        batches: step -> (tokens (B, S), targets (B, S)); a target of ``IGNORE`` does not count.
        lock: held shared for one step at a time.
    """
    optimizer = make_optimizer(model, learning_rate)
    model.train()
    seconds, losses = 0.0, []
    for step, rate in enumerate(learning_rates(steps, learning_rate)):
        with lock.shared():
            start = time.perf_counter()
            optimizer.param_groups[0]["lr"] = rate
            losses.append(train_step(model, optimizer, *batches(step), context))
            seconds += time.perf_counter() - start
    stride = max(1, steps // _CURVE_POINTS)
    kept = [*range(0, steps, stride), *([steps - 1] if (steps - 1) % stride else [])]
    return seconds, tuple(("train_loss", step, float(losses[step])) for step in kept)


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    targets: Tensor,
    context: AbstractContextManager,
) -> Tensor:
    """One step of gradient descent, of learned selectors too. Returns the task's loss before it, detached."""
    with context:
        loss = cross_entropy(model(tokens), targets)
    optimizer.zero_grad(set_to_none=True)
    (loss + selector_loss(model)).backward()
    descend(model, optimizer)
    step_schedules(model)
    return loss.detach()


def descend(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Applies the gradients, their norm clipped to 1."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Nats of (B, S) targets under (B, S, vocab) logits, computed in at least float32."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction=reduction)


def learning_rates(steps: int, peak: float) -> Iterator[float]:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(_WARMUP_SHARE * steps))
    for step in range(steps):
        decay = 0.55 + 0.45 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
        yield peak * min(1.0, (step + 1) / warmup) * decay
