"""Codecs and the exchange where the gradients are: on the CPU, and on a GPU with ``-m gpu``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raybsa.comm import Communicator
from raybsa.gradients import CATALOG, GradientExchange, State, build


@pytest.mark.parametrize("name", CATALOG)
def test_a_payload_stays_on_its_device_and_says_what_it_says_on_the_cpu(name: str, device: str) -> None:
    codec, x = build(name), torch.randn(200, 300)
    here, there = (codec.compress(each, State()) for each in (x, x.to(device)))
    assert {part.device.type for part in there.tensors} == {device}
    if name == "powersgd":  # sums in another order
        torch.testing.assert_close(codec.extract(there).cpu(), codec.extract(here), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(codec.extract(there).cpu(), codec.extract(here))


@pytest.mark.parametrize("name", CATALOG)
def test_the_exchange_sees_gradients_that_are_done_and_the_optimizer_sees_its_results(name: str, device: str) -> None:
    """Big enough that a missing order between streams shows: every step's result must be this step's."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4))).to(device)
    exchange = GradientExchange(
        model.named_parameters(), build(name), Communicator(device=device), bucket_bytes=1, mean=True
    )
    states = [State(tensor=i) for i in range(4)]
    x = torch.randn(256, 512, device=device)
    with exchange.no_sync():
        loss = model(x).square().mean()
        wanted = torch.autograd.grad(loss, list(model.parameters()))[::-1]
    for _ in range(3):
        model.zero_grad()
        model(x).square().mean().backward()
        exchange.finish()
        expected = build(name).exchange(wanted, states, Communicator(device=device))
        got = [parameter.grad for parameter in model.parameters()][::-1]
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    exchange.close()
