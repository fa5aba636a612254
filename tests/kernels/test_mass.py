"""block_mass is the gradient of the rows' lse by block_bias."""

from dataclasses import replace

import pytest
import torch

from raybsa.kernels import chunks
from raybsa.kernels.api import run_call
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.mass import block_mass
from tests.kernels.problems import PROBLEMS, Problem


def call_of(problem: Problem, dtype: torch.dtype = torch.float64) -> AttentionCall:
    layout = problem.layout()
    bias = torch.randn(layout.nnz_blocks, dtype=dtype, requires_grad=True)
    return AttentionCall(*problem.inputs(dtype), layout, 0.25, None, None, bias, 0.0, None, False, True)


def by_autograd(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
    """lse, and the gradient of its finite part by block_bias, from the reference."""
    _, lse = run_call(call, "reference")
    (mass,) = torch.autograd.grad(torch.where(lse == -torch.inf, 0.0, lse).sum(), call.block_bias)
    return lse.detach(), mass


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_it_is_what_autograd_says_of_the_reference(problem):
    call = call_of(problem)
    lse, wanted = by_autograd(call)
    torch.testing.assert_close(block_mass(call, lse), wanted)


def test_masks_segments_and_rows_in_pieces_are_counted_as_attended(monkeypatch):
    monkeypatch.setattr(chunks, "PIECE_BYTES", 50_000)
    call = call_of(Problem("mixed", causal=True, groups=8, q_len=117, kv_len=117))
    ids = torch.randint(2, (2, 117))
    call = replace(call, attn_mask=torch.rand(4, 117, 117) < 0.7, segment_ids=(ids, ids), dropout_p=0.0)
    lse, wanted = by_autograd(call)
    torch.testing.assert_close(block_mass(call, lse), wanted)


def test_half_precision_is_summed_in_float32():
    call = call_of(Problem("half", groups=4))
    lse, wanted = by_autograd(call)
    low = replace(call, **{name: getattr(call, name).bfloat16() for name in "qkv"})
    mass = block_mass(low, lse.float())
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), wanted, atol=0.5, rtol=0.05)


def test_a_power_is_taken_of_what_a_query_gives_to_a_block():
    call = replace(call_of(Problem("per head", groups=4)), block_bias=None)
    lse = run_call(call, "reference")[1]
    layout, copies = call.layout, call.q.shape[1] // call.k.shape[1]
    weights = (call.q @ call.k.repeat_interleave(copies, 1).transpose(-1, -2) * call.scale - lse[..., None]).exp()
    group, row, column = layout.coordinates()
    wanted = torch.zeros(layout.nnz_blocks, dtype=torch.float64)
    for entry, (g, i, j) in enumerate(zip(group, row, column, strict=True)):
        rows, keys = slice(i * layout.q_block_size, None), slice(j * layout.kv_block_size, None)
        heads = weights.flatten(0, 1)[g :: layout.num_groups]
        held = heads[:, rows, keys][:, : layout.q_block_size, : layout.kv_block_size]
        wanted[entry] = held.sum(-1).pow(3.0).sum()
    torch.testing.assert_close(block_mass(call, lse, 3.0), wanted)
