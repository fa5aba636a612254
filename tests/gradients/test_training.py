"""A small network trained on two ranks: how far each codec ends from uncompressed gradients, and what it sends."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from raybsa.comm import Communicator
from raybsa.gradients import GradientExchange, build
from tests.ranks import run_ranks


def student(generator: torch.Generator) -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def loss_of(model: nn.Module, teacher: Tensor, count: int, seed: int) -> Tensor:
    x = torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))
    return (model(x) - torch.sin(2 * x @ teacher)).square().mean()


@cache
def trained(steps: int, name: str, **params: object) -> tuple[float, int]:
    """The loss on unseen data and the bytes a rank sent."""

    def work(communicator: Communicator) -> tuple[float, int]:
        generator = torch.Generator().manual_seed(0)
        teacher, model = torch.randn(32, 8, generator=generator) / 5, student(generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        exchange = GradientExchange(model.named_parameters(), build(name, **params), communicator, bucket_bytes=10_000)
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, teacher, 32, 1000 * communicator.rank + step + 7).backward()
            exchange.finish()
            optimizer.step()
        exchange.close()
        with torch.no_grad():
            return float(loss_of(model, teacher, 512, 5)), communicator.ledger.sent["gradient"]

    first, second = run_ranks(2, work)
    assert first == second
    return first


@pytest.mark.parametrize(
    ("steps", "name", "params", "gap", "fewer"),
    [
        (100, "fp16", {}, 0.001, 2.0),
        (100, "bf16", {}, 0.001, 2.0),
        (100, "int8", {}, 0.001, 3.9),
        (300, "topk", {"density": 0.05}, 0.04, 9.9),
        (300, "powersgd", {"rank": 2}, 0.04, 6.4),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_each_codec_trains_to_near_the_uncompressed_loss(
    steps: int, name: str, params: dict, gap: float, fewer: float
) -> None:
    (plain, plain_bytes), (loss, sent) = trained(steps, "none"), trained(steps, name, **params)
    assert loss <= (1 + gap) * plain, f"loss {loss:.4f}, uncompressed {plain:.4f}, a gap of {loss / plain - 1:.2%}"
    assert plain_bytes / sent >= fewer


@pytest.mark.parametrize(("name", "params"), [("topk", {"density": 0.05}), ("powersgd", {"rank": 2})])
def test_without_error_feedback_the_gap_is_wide(name: str, params: dict) -> None:
    loss, _ = trained(300, name, error_feedback=False, **params)
    assert loss > 1.1 * trained(300, "none")[0], "or this task could not tell whether error feedback works"
