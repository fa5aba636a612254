"""The kernels of a selection equal the torch operations, on the CPU under Triton's interpreter and on CUDA."""

from __future__ import annotations

import pytest
import torch

from raybsa.kernels import triton_setup
from raybsa.selectors.pooling import block_stats
from raybsa.selectors.rules import Rules
from raybsa.selectors.selection import best_columns
from raybsa.selectors.shape import Shape

pytest.importorskip("triton")
from raybsa.selectors.triton_pool import pooled
from raybsa.selectors.triton_select import choose


@pytest.fixture(autouse=True)
def needs_a_gpu_or_the_interpreter(device: str) -> None:
    if device == "cpu" and not triton_setup.interpreting():
        pytest.skip("TRITON_INTERPRET is not set")
    triton_setup.repair_interpreter()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), [(160, 160), (250, 121), (100, 250)])
@pytest.mark.parametrize(("sinks", "window", "density"), [(0, 1, 0.2), (2, 3, 0.4), (1, 2, 1.0)])
def test_it_chooses_what_a_stable_sort_chooses(device, causal, q_len, kv_len, sinks, window, density):
    shape = Shape.make(Rules(16, causal, sinks=sinks, window=window), q_len, kv_len, density, device)
    u = torch.randn(1, 2, len(shape.rows), 3, device=device).round()  # many ties, zeros of both signs
    w = torch.randn(1, 2, shape.columns, 3, device=device).round()
    w[0, 1, 2] *= 1e30
    wanted = shape.columns_of(best_columns(u, w, shape))
    found = torch.full_like(wanted, -1)
    scores = (u @ w.transpose(-1, -2)).flatten(0, 1)
    for first, some in ((0, scores[:, :4]), (4, scores[:, 4:])):
        choose(some.contiguous(), shape, first, found)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("tokens", [5, 64, 77])
def test_it_pools_as_torch_does(device, tokens):
    x = torch.randn(2, tokens, 3, 20, device=device).transpose(1, 2) - 1
    torch.testing.assert_close(pooled(x, 16), block_stats(x.cpu(), 16).to(device))
