"""The kernels with warps of their own for loads: equal to float64, and to themselves to the bit, on a Hopper GPU.

Each program takes many works here, so that what one of them leaves behind would show in the next.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels import triton_plan
from raybsa.kernels.api import run_call
from raybsa.kernels.backward import attention_backward
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.delta import row_delta
from raybsa.kernels.triton_setup import is_hopper
from tests.kernels.problems import Problem, outputs_and_gradients

pytest.importorskip("triton")
from raybsa.kernels.gluon_walk import Walk

pytestmark = pytest.mark.gpu

PROBLEMS = [
    Problem("many-works", "random", False, 1, 16, 16, 4096, 4096, groups=16),
    Problem("causal", "random", True, 1, 16, 16, 2048, 2048, groups=16),
    Problem("per-sample-gqa-causal", "random", True, 2, 8, 2, 1024, 1024, groups=16),
    Problem("ragged-cross", "random", False, 1, 8, 8, 1000, 1333, groups=8),
    Problem("ragged-keys", "random", False, 1, 8, 8, 1024, 1333, groups=8),
    Problem("one-global-row", "global", False, 1, 16, 16, 4096, 4096),
]
SHAPES = [(128, 128, 128), (128, 128, 64), (64, 64, 128), (128, 64, 128), (256, 128, 64)]
BUDGET = 4e-3  # relative, of the norm: bfloat16 rounds to 2**-9


@pytest.fixture(autouse=True)
def _on_hopper() -> None:
    if not torch.cuda.is_available() or not is_hopper(torch.device("cuda", 0)):
        pytest.skip("no Hopper GPU")


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_they_equal_float64_and_repeat_to_the_bit(
    problem: Problem, shape: tuple[int, int, int], split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if split:
        monkeypatch.setattr(triton_plan, "MIN_PART_TOKENS", 128)
        monkeypatch.setattr(triton_plan, "SHARES", 10**6)
    problem = replace(problem, q_block=shape[0], kv_block=shape[1], head_dim=shape[2])
    layout, inputs = problem.layout("cuda"), problem.inputs(torch.bfloat16, "cuda")
    grad_out, grad_lse = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3], device="cuda")
    first, second = (outputs_and_gradients(inputs, layout, grad_out, grad_lse, backend="triton") for _ in range(2))
    wide = [x.double() for x in inputs]
    wanted = outputs_and_gradients(wide, layout, grad_out.double(), grad_lse.double(), backend="reference")
    for name, reference in wanted.items():
        assert torch.equal(first[name], second[name]), f"{name} differs from call to call"
        error = distance(first[name], reference)
        assert error <= BUDGET, f"{name}: relative error {error:.1e}, budget {BUDGET:.0e}"


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS[1:5], ids=lambda problem: problem.name)
def test_gradients_of_a_part_of_the_keys_come_unrounded(
    problem: Problem, shape: tuple[int, int, int], split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if split:
        monkeypatch.setattr(triton_plan, "MIN_PART_TOKENS", 128)
        monkeypatch.setattr(triton_plan, "SHARES", 10**6)
    walks = counted_walks(monkeypatch)
    problem = replace(problem, q_block=shape[0], kv_block=shape[1], head_dim=shape[2])
    layout, (q, k, v) = problem.layout("cuda"), problem.inputs(torch.bfloat16, "cuda")
    whole = AttentionCall(q, k, v, layout, 0.125, None, None, None, 0.0, None, True, True)
    out, lse = run_call(whole, "blocked")
    grad_out = torch.randn_like(out)
    delta = row_delta(out, grad_out)
    half = layout.num_kv_blocks // 2
    part, keys = layout.select(None, torch.arange(half, device="cuda")), slice(half * shape[1])
    call = replace(whole, k=k[:, :, keys], v=v[:, :, keys], layout=part)
    first, second = (attention_backward(call, lse, delta, grad_out, backend="triton")[:3] for _ in range(2))
    walk_keys = layout.q_tokens % shape[0] == 0 and (shape[1] == 128 or shape[:2] == (64, 64))
    assert len(walks) == (4 if walk_keys else 2)
    wide = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double())
    wanted = attention_backward(wide, lse.double(), delta.double(), grad_out.double(), backend="blocked")
    for got, again, exact in zip(first, second, wanted[:3], strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, again)
        assert distance(got, exact) <= BUDGET


def distance(got: Tensor, wanted: Tensor) -> float:
    """Relative, of the norm."""
    return float((got.double() - wanted).norm() / wanted.norm())


def counted_walks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Grows by one with each launch of these kernels."""
    walks: list[Any] = []
    run = Walk.__call__
    monkeypatch.setattr(Walk, "__call__", lambda self, *arguments: (walks.append(self), run(self, *arguments))[1])
    return walks


def test_launches_on_two_streams_at_one_time_do_not_share_their_works() -> None:
    problem = replace(PROBLEMS[0], q_block=128, kv_block=128, head_dim=128)
    layout, inputs = problem.layout("cuda"), problem.inputs(torch.bfloat16, "cuda")
    wanted = _attend(inputs, layout)
    torch.cuda.synchronize()
    streams, got = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append(_attend(inputs, layout))
    torch.cuda.synchronize()
    assert all(torch.equal(x, wanted) for x in got)


@pytest.mark.parametrize("with_bias", [False, True])
def test_what_they_do_not_serve_goes_to_the_tiled_kernels(with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = counted_walks(monkeypatch)
    problem = replace(PROBLEMS[1], q_block=128, kv_block=128, head_dim=128)
    layout, inputs = problem.layout("cuda"), problem.inputs(torch.bfloat16, "cuda")
    leaves = [x.requires_grad_() for x in inputs]
    bias = torch.zeros(layout.nnz_blocks, device="cuda") if with_bias else None
    out = block_sparse_attention(*leaves, layout, block_bias=bias, backend="triton")
    assert isinstance(out, Tensor)
    torch.autograd.grad(out, leaves, torch.randn_like(out))  # a sum's gradient has no strides
    assert len(walks) == (0 if with_bias else 3)


def _attend(inputs: list[Tensor], layout: BlockLayout) -> Tensor:
    out = block_sparse_attention(*inputs, layout, backend="triton")
    assert isinstance(out, Tensor)
    return out
