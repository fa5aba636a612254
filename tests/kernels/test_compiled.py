"""A compiled module that calls block_sparse_attention has one graph, forward and backward, and eager's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels import triton_setup

pytest.importorskip("triton")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def needs_a_gpu_or_the_interpreter(device: str) -> None:
    if device == "cpu" and not triton_setup.interpreting():
        pytest.skip("Triton's interpreter is off where there is a GPU")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def causal_layout(device: str, rows: list[list[int]]) -> BlockLayout:
    return BlockLayout.from_rows(rows, q_len=30, kv_len=30, q_block_size=16, causal=True, device=device)


class Attending(nn.Module):
    def __init__(self, layout: BlockLayout, **options: Any) -> None:
        super().__init__()
        self.projection, self.layout, self.options = nn.Linear(16, 48), layout, options

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.projection(x).chunk(3, -1)
        out, lse = block_sparse_attention(
            q, k, v, self.layout, block_bias=bias, return_lse=True, backend="triton", **self.options
        )
        return out.relu() + lse[..., None]


def results(module: Any, x: Tensor, bias: Tensor) -> list[Tensor]:
    x, bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    out = module(x, bias)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, bias])]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_module_has_one_graph_and_eager_s_numbers(device: str) -> None:
    torch.compiler.reset()
    module = Attending(causal_layout(device, [[0], [0, 1]]), dropout_p=0.2, seed=3).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 30, 16, device=device)
    for rows in ([[0], [0, 1]], [[], [1]], [[0], [1]]):  # a module may be given another layout
        module.layout = causal_layout(device, rows)
        bias = torch.randn(module.layout.nnz_blocks, device=device)
        for got, wanted in zip(results(compiled, x, bias), results(module, x, bias), strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_says_what_it_cannot_serve(device: str) -> None:
    torch.compiler.reset()
    module = Attending(causal_layout(device, [[0], [0, 1]]), scale=1.0).to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="block_bias must be"):
        compiled(torch.randn(1, 2, 30, 16, device=device), torch.zeros(9, device=device))
