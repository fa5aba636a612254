"""One suite for every backend: each equals the float64 reference in values and in gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels import chunks
from tests.kernels.problems import PROBLEMS, Problem, in_double, outputs_and_gradients, relative_error

TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-5, 1e-4)}
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def assert_equals_reference(
    problem: Problem, dtype: torch.dtype, device: str, layout: BlockLayout | None = None, **options: Any
) -> None:
    layout = layout or problem.layout(device)
    inputs = problem.inputs(dtype, device)
    grad_out = torch.randn_like(inputs[0])
    grad_lse = torch.randn(inputs[0].shape[:3], dtype=dtype, device=device)
    got = outputs_and_gradients(inputs, layout, grad_out, grad_lse, backend="blocked", **options)
    wide, wide_options = in_double(inputs, options)
    wanted = outputs_and_gradients(
        wide, layout, grad_out.double(), grad_lse.double(), backend="reference", **wide_options
    )
    assert got.keys() == wanted.keys()
    for name in wanted:
        budget = TOLERANCE[dtype]["grad" in name]
        error = relative_error(got[name], wanted[name])
        assert error <= budget, f"{name}: relative error {error:.2e}, budget {budget:.0e}"


@problems
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_blocked_equals_the_reference(problem: Problem, dtype: torch.dtype, device: str) -> None:
    assert_equals_reference(problem, dtype, device)


@problems
def test_every_argument_together_equals_the_reference(problem: Problem, device: str) -> None:
    layout = problem.layout(device)
    options = {
        "scale": 0.3,
        "attn_mask": torch.randn(problem.batch, 1, problem.q_len, problem.kv_len, dtype=torch.float64, device=device),
        "segment_ids": tuple(
            torch.randint(0, 2, (problem.batch, n), device=device) for n in (problem.q_len, problem.kv_len)
        ),
        "block_bias": torch.randn(layout.nnz_blocks, dtype=torch.float64, device=device),
        "dropout_p": 0.3,
        "seed": 7,
    }
    assert_equals_reference(problem, torch.float64, device, layout, **options)


@pytest.mark.parametrize("shape", [(128, 128), (1, 128), (4, 1, 128), (2, 1, 1, 128), (2, 4, 128, 1)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask_broadcasts_without_being_expanded(shape: tuple[int, ...], kind: str, device: str) -> None:
    problem = Problem("mask", causal=True)
    mask = torch.randn(shape, dtype=torch.float64, device=device)
    mask = mask > -0.5 if kind == "bool" else mask.masked_fill(mask < -1.0, float("-inf"))
    assert_equals_reference(problem, torch.float64, device, attn_mask=mask)


@pytest.mark.parametrize("threads", [1, 2])  # a chunk grows with them
@pytest.mark.parametrize("problem", PROBLEMS[:4], ids=lambda p: p.name)
def test_rows_split_into_pieces_equal_the_reference(
    problem: Problem, threads: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(chunks, "PIECE_BYTES", 1)
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 2**18)
    layout = problem.layout(device)
    bias = torch.randn(layout.nnz_blocks, dtype=torch.float64, device=device)
    assert_equals_reference(problem, torch.float64, device, layout, block_bias=bias)


@pytest.mark.parametrize("problem", PROBLEMS[:7], ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_errors_stay_within_twice_those_of_dense_torch(
    problem: Problem, dtype: torch.dtype, device: str
) -> None:
    layout, inputs = problem.layout(device), problem.inputs(dtype, device)
    grad_out, grad_lse = torch.randn_like(inputs[0]), torch.zeros(inputs[0].shape[:3], device=device)
    wide = [x.double() for x in inputs]
    wanted = outputs_and_gradients(wide, layout, grad_out.double(), grad_lse.double(), backend="reference")
    got = outputs_and_gradients(inputs, layout, grad_out, grad_lse, backend="blocked")
    dense = _dense_in_low_precision(problem, inputs, layout, grad_out)
    for name, reference in dense.items():
        error, budget = relative_error(got[name], wanted[name]), 2 * relative_error(reference, wanted[name])
        assert error <= budget, (
            f"{name}: relative error {error:.2e}, budget {budget:.2e} (dense torch {budget / 2:.2e})"
        )


def _dense_in_low_precision(
    problem: Problem, inputs: list[Tensor], layout: BlockLayout, grad_out: Tensor
) -> dict[str, Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    blocks = layout.to_dense().repeat_interleave(problem.q_block, 1).repeat_interleave(problem.kv_block, 2)
    mask = blocks[:, : problem.q_len, : problem.kv_len]
    mask = mask.view(-1 if layout.num_groups > problem.heads else 1, *mask.shape[-3:]) if mask.dim() == 3 else mask
    if layout.num_groups == problem.batch * problem.heads:
        mask = mask.view(problem.batch, problem.heads, *mask.shape[-2:])
    if layout.causal:
        mask = mask & torch.ones(problem.q_len, problem.kv_len, dtype=torch.bool, device=q.device).tril()
    repeats = problem.heads // problem.kv_heads
    keys, values = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ keys.transpose(-1, -2)) * problem.head_dim**-0.5
    alive = mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~mask & alive, float("-inf")), -1) * alive
    out = weights @ values
    (out * grad_out).sum().backward()
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return {"out": out.detach(), "grad q": q.grad, "grad k": k.grad, "grad v": v.grad}


@pytest.mark.parametrize("causal", [False, True])
def test_a_full_layout_equals_torch_sdpa(causal: bool, device: str) -> None:
    problem = Problem("full", kind="dense", causal=causal, q_len=100, kv_len=100)
    q, k, v = problem.inputs(torch.float64, device)
    got = block_sparse_attention(q, k, v, problem.layout(device))
    torch.testing.assert_close(got, functional.scaled_dot_product_attention(q, k, v, is_causal=causal))


def test_gradcheck_passes_for_every_differentiable_input() -> None:
    problem = Problem("tiny", batch=1, heads=2, kv_heads=1, q_len=7, kv_len=7, q_block=4, kv_block=4, head_dim=3)
    layout = Problem("tiny", kind="window", q_len=7, kv_len=7, q_block=4, kv_block=4, causal=True).layout()
    q, k, v = (x.requires_grad_() for x in problem.inputs(torch.float64))
    bias = torch.randn(layout.nnz_blocks, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 1, 7, dtype=torch.float64, requires_grad=True)

    def attention(*leaves: Tensor) -> tuple[Tensor, ...]:
        q, k, v, bias, mask = leaves
        out = block_sparse_attention(
            q, k, v, layout, block_bias=bias, attn_mask=mask, dropout_p=0.2, seed=3, return_lse=True, backend="blocked"
        )
        assert isinstance(out, tuple)
        return out

    assert torch.autograd.gradcheck(attention, (q, k, v, bias, mask))


@problems
def test_values_of_one_give_one_and_empty_rows_give_zero(problem: Problem, device: str) -> None:
    q, k, v = problem.inputs(torch.float32, device)
    out, lse = block_sparse_attention(q, k, torch.ones_like(v), problem.layout(device), return_lse=True)
    sees = (lse > float("-inf"))[..., None].expand_as(out)
    assert sees.any()
    torch.testing.assert_close(out[sees], torch.ones_like(out[sees]))
    assert (out[~sees] == 0).all()


def test_rows_with_nothing_to_attend_get_zero_gradients(device: str) -> None:
    problem = Problem("empty row", q_len=96, kv_len=96)
    layout = problem.layout(device)
    q, k, v = (x.requires_grad_() for x in problem.inputs(torch.float32, device))
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    out.sum().backward()
    empty = slice(32, 64)
    assert (lse[:, :, empty] == float("-inf")).all()
    assert (q.grad[:, :, empty] == 0).all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -1e9])
def test_rows_that_a_finite_mask_hides_whole_have_the_gradients_of_a_mean(hidden: float, backend: str) -> None:
    """Their lse is too large to hold the logarithm of their number of keys."""
    q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
    layout = BlockLayout.from_rows([[0]], q_len=4, kv_len=4, q_block_size=4)
    mask = torch.full((4, 4), hidden)
    out, lse = block_sparse_attention(q, k, v, layout, attn_mask=mask, scale=1e-9, return_lse=True, backend=backend)
    (out.sum() + 1e9 * lse.sum()).backward()
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v))
    torch.testing.assert_close(v.grad, torch.ones_like(v))
    torch.testing.assert_close(k.grad, q.detach().mean(2, keepdim=True).expand_as(k))


def test_a_future_token_never_changes_an_earlier_output(device: str) -> None:
    problem = Problem("causal", kind="dense", causal=True, q_len=117, kv_len=117)
    layout, (q, k, v) = problem.layout(device), problem.inputs(torch.float32, device)
    before = block_sparse_attention(q, k, v, layout)
    for token in (1, 31, 32, 116):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, token:] = torch.randn_like(x[:, :, token:])
        after = block_sparse_attention(*changed, layout)
        assert torch.equal(before[:, :, :token], after[:, :, :token])
        assert not torch.equal(before[:, :, token:], after[:, :, token:])


def test_inputs_of_any_memory_layout_give_the_same_numbers(device: str) -> None:
    problem = Problem("strides", causal=True, q_len=100, kv_len=100)
    layout, inputs = problem.layout(device), problem.inputs(torch.float64, device)
    wanted = block_sparse_attention(*inputs, layout)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    fused = torch.stack([x.transpose(1, 2) for x in inputs], 2)  # (B, S, 3, H, D)
    slices = [fused[:, :, i].transpose(1, 2) for i in range(3)]
    scattered = [torch.stack([x, x], -1)[..., 1] for x in inputs]  # stride 2 along D
    for layout_name, tensors in {"token-major": token_major, "fused": slices, "strided": scattered}.items():
        assert not any(x.is_contiguous() for x in tensors)
        torch.testing.assert_close(block_sparse_attention(*tensors, layout), wanted, msg=layout_name)
    one_head = [inputs[0], *(x[:, :1].expand(-1, 4, -1, -1) for x in inputs[1:])]
    torch.testing.assert_close(
        block_sparse_attention(*one_head, layout), block_sparse_attention(*(x.contiguous() for x in one_head), layout)
    )


def test_dropout_keeps_the_mean_and_follows_its_seed(device: str) -> None:
    problem = Problem("dropout", kind="dense", q_len=256, kv_len=256, heads=8, kv_heads=8)
    layout, (q, k, v) = problem.layout(device), problem.inputs(torch.float32, device)
    ones = torch.ones_like(v)
    first = block_sparse_attention(q, k, ones, layout, dropout_p=0.25, seed=1)
    again = block_sparse_attention(q, k, ones, layout, dropout_p=0.25, seed=1)
    other = block_sparse_attention(q, k, ones, layout, dropout_p=0.25, seed=2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert abs(first.mean().item() - 1.0) < 0.01
    drawn = [block_sparse_attention(q, k, ones, layout, dropout_p=0.25) for _ in range(2)]
    assert not torch.equal(*drawn)


def test_autocast_computes_in_its_dtype_and_gradients_come_back_in_float32(device: str) -> None:
    problem = Problem("autocast", causal=True)
    layout, inputs = problem.layout(device), problem.inputs(torch.float32, device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast(device, torch.bfloat16):
        out = block_sparse_attention(*leaves, layout)
        out.float().sum().backward()
    wanted = block_sparse_attention(*(x.bfloat16() for x in inputs), layout)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, wanted)
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)


def test_deterministic_calls_repeat_to_the_bit(device: str) -> None:
    problem = Problem("repeat", kind="dense", q_len=256, kv_len=256)
    layout, inputs = problem.layout(device), problem.inputs(torch.float32, device)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        block_sparse_attention(*leaves, layout, deterministic=True, backend="blocked").square().sum().backward()
        runs.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
