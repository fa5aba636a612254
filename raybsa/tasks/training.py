"""Training a task's model: one step, and the loop over steps that lets a timing neighbour in between them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybsa.tasks.optimizer import AdamW
from raybsa.tasks.speed import OwnAttention
from raybsa.timing import DeviceLock
from raybsa.variants.selector import selector_loss, step_schedules

IGNORE = -100
_WARMUP_SHARE = 0.1
_CURVE_POINTS = 50

Batches = Callable[[int], Any]
Loss = Callable[[nn.Module, Any], Tensor]
Curves = tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Quality:
    """What training led to. ``goal`` is ``"min"`` or ``"max"``; ``curves`` are (name, step, value).

    ``train_seconds`` counts the ``steps`` themselves, not the waits for a neighbour that was timing.
    """

    name: str
    goal: str
    value: float
    train_seconds: float
    curves: Curves
    steps: int


def prepare(model: nn.Module, device: torch.device, dtype: str) -> tuple[nn.Module, AbstractContextManager]:
    """The model on its device, and the context to run it in: bfloat16 trains float32 weights under autocast."""
    if dtype == "float16":
        raise ValueError("quality trains in float32, float64 or bfloat16, got float16; time it with task 'speed'")
    if dtype == "bfloat16":
        return model.to(device), torch.autocast(device.type, torch.bfloat16)
    return model.to(device, getattr(torch, dtype)), nullcontext()


def token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Nats a token: of a batch (tokens (B, S), targets (B, S)); a target of ``IGNORE`` does not count."""
    tokens, targets = batch
    return cross_entropy(model(tokens), targets)


class Training:
    """A task's model on its way: AdamW, a linear warm-up and a cosine to a tenth; can halt at any step and go on.

    Args:
        batches: step -> what ``loss`` takes beside the model; each step is asked for once, in order.
        evaluate: the quality of the model as it is.
        steps: how many there are in all; the learning rate follows from it.
        name, goal: of the quality.
        lock: held shared for one step at a time.
        loss: (model, batch) -> (), to be minimised.
        attention: what the trial times in place of the spec's attention on synthetic q, k, v.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        evaluate: Callable[[], float],
        *,
        name: str,
        goal: str,
        steps: int,
        learning_rate: float,
        lock: DeviceLock,
        context: AbstractContextManager,
        loss: Loss = token_loss,
        attention: OwnAttention | None = None,
    ) -> None:
        self._model, self._batches, self._evaluate, self._lock, self._context = model, batches, evaluate, lock, context
        self._name, self._goal, self._loss = name, goal, loss
        self.attention = attention
        self._optimizer = make_optimizer(model, learning_rate)
        self._rates = list(learning_rates(steps, learning_rate))
        self._seconds, self._losses = 0.0, list[Tensor]()
        self._qualities: list[tuple[int, float]] = []

    def advance(self, step: int | None = None) -> Quality:
        """Trains until ``step`` steps are done (None: all), then evaluates; steps that are done stay done."""
        self._model.train()
        for number in range(len(self._losses), len(self._rates) if step is None else min(step, len(self._rates))):
            with self._lock.shared():
                start = time.perf_counter()
                self._optimizer.param_groups[0]["lr"] = self._rates[number]
                batch = self._batches(number)
                self._losses.append(train_step(self._model, self._optimizer, batch, self._context, self._loss))
                self._seconds += time.perf_counter() - start
        value = self._evaluate()
        self._qualities.append((len(self._losses), value))
        return Quality(self._name, self._goal, value, self._seconds, self._curves(), len(self._losses))

    def weights(self) -> dict[str, Tensor]:
        """The model's, as they are."""
        return self._model.state_dict()

    def with_weights(self, weights: Mapping[str, Tensor]) -> Quality:
        """The quality with another training's weights, which the model then keeps; nothing is trained.

        Raises:
            RuntimeError: they are not those of this model.
        """
        self._model.load_state_dict(weights)
        return Quality(self._name, self._goal, self._evaluate(), 0.0, (), 0)

    def _curves(self) -> Curves:
        return curves_of(self._losses, len(self._rates), self._name, self._qualities)


def curves_of(losses: Sequence[Tensor], steps: int, name: str, qualities: Sequence[tuple[int, float]]) -> Curves:
    """The loss (nats a token) as means of some fifty stretches of ``steps``, each at its first step; the quality where
    it was looked at more than once."""
    stretch = max(1, steps // _CURVE_POINTS)
    parts = [(start, losses[start : start + stretch]) for start in range(0, len(losses), stretch)]
    means = [("train_loss", start, float(torch.stack(list(part)).mean())) for start, part in parts]
    return (*means, *((name, *point) for point in qualities if len(qualities) > 1))


def make_optimizer(model: nn.Module, learning_rate: float) -> AdamW:
    return AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    context: AbstractContextManager,
    loss_of: Loss,
) -> Tensor:
    """One step of gradient descent, of learned selectors too. Returns the task's loss before it, detached."""
    with context:
        loss = loss_of(model, batch)
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
