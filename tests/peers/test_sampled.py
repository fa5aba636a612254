"""The sampled check: equal to the reference where both can be computed, and it sees what is wrong anywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raybsa import block_sparse_attention
from raybsa.kernels.call import AttentionCall
from raybsa.tasks import sampled
from raybsa.tasks.sampled import (
    forward_error,
    gradient_error,
    parts_error,
    picks_of,
    sampled_attention,
    sampled_gradient,
)
from tests.kernels.problems import Problem

PROBLEMS = [
    Problem("per-head", groups=4, batch=1, kind="global"),
    Problem("gqa-causal-ragged", kind="window", causal=True, kv_heads=2, groups=4, batch=2, q_len=117, kv_len=117),
    Problem("shared-cross", kind="global", q_len=70, kv_len=150, batch=1),
]


def call_of(problem: Problem) -> AttentionCall:
    q, k, v = (x.requires_grad_() for x in problem.inputs(torch.float32))
    scale = 1 / math.sqrt(problem.head_dim)
    return AttentionCall(q, k, v, problem.layout(), scale, None, None, None, 0.0, None, False, False)


def results(call: AttentionCall, grad_out: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = block_sparse_attention(call.q, call.k, call.v, call.layout, backend="reference")
    assert isinstance(out, Tensor)
    return out.detach(), torch.autograd.grad(out, (call.q, call.k, call.v), grad_out)


@pytest.mark.parametrize("few", [False, True], ids=["whole", "sampled"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_sampled_rows_equal_the_reference(problem: Problem, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if few:
        monkeypatch.setattr(sampled, "WHOLE_TOKENS", 16)
        monkeypatch.setattr(sampled, "SAMPLED_BLOCKS", 2)
    call = call_of(problem)
    picks = picks_of(call)
    assert len(picks) == 2 * (2 if few else call.layout.num_q_blocks)
    grad_out = sampled_gradient(call, picks)
    exact = sampled_attention(call, picks, grad_out, torch.float32)
    out, gradients = results(call, grad_out)
    assert forward_error(out, exact, call) < 1e-5
    assert gradient_error(gradients, exact) < 1e-5
    rounded = sampled_attention(call, picks, grad_out, torch.bfloat16)
    assert all(1e-4 < error < 5e-2 for error in parts_error(rounded, exact))


@pytest.mark.parametrize("which", [0, 1, 2], ids=["dq", "dk", "dv"])
@pytest.mark.parametrize("head", [0, 1], ids=["a sampled head", "a head that was not sampled"])
def test_one_wrong_number_is_an_error(which: int, head: int) -> None:
    call = call_of(PROBLEMS[0])
    picks = picks_of(call)
    grad_out = sampled_gradient(call, picks)
    exact = sampled_attention(call, picks, grad_out, torch.float32)
    out, gradients = results(call, grad_out)
    gradients[which][0, head, 100, 3] += 0.5 * float(gradients[which].abs().max())
    assert gradient_error(gradients, exact) > 0.3
    gradients[which][0, head, 100, 3] = float("nan")
    assert not gradient_error(gradients, exact) <= 0.3
    out[0, 0, 5, 3] = float("nan")
    assert not forward_error(out, exact, call) <= 0.3
