"""merge adds partial results over disjoint keys; selections of a layout are where partial results come from."""

import pytest
import torch

from raybsa import block_sparse_attention
from raybsa.kernels.merge import merge
from tests.kernels.problems import Problem

INF = float("inf")


def test_parts_over_disjoint_keys_merge_into_the_whole(device: str) -> None:
    problem = Problem("parts", groups=4, causal=True, q_len=250, kv_len=250)
    layout, (q, k, v) = problem.layout(device), problem.inputs(torch.float64, device)
    wanted, wanted_lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -INF, dtype=torch.float64, device=device)
    for part in (torch.tensor([0, 3, 7]), torch.tensor([1, 2]), torch.tensor([4, 5, 6])):
        tokens = torch.cat([torch.arange(32 * b, min(32 * b + 32, 250)) for b in part.tolist()]).to(device)
        of_part = layout.select(None, part.to(device))
        partial = block_sparse_attention(q, k[:, :, tokens], v[:, :, tokens], of_part, return_lse=True)
        out, lse = merge(out, lse, *partial)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


def test_rows_of_a_selection_equal_those_rows_of_the_whole(device: str) -> None:
    problem = Problem("rows", causal=True, q_len=250, kv_len=250)
    layout, (q, k, v) = problem.layout(device), problem.inputs(torch.float64, device)
    wanted = block_sparse_attention(q, k, v, layout, dropout_p=0.2, seed=5)
    rows = torch.tensor([1, 5, 7], device=device)
    tokens = torch.cat([torch.arange(32 * b, min(32 * b + 32, 250)) for b in rows.tolist()]).to(device)
    got = block_sparse_attention(q[:, :, tokens], k, v, layout.select(rows, None), dropout_p=0.2, seed=5)
    torch.testing.assert_close(got, wanted[:, :, tokens])


def test_merge_ignores_a_side_that_saw_nothing_and_keeps_nothing_of_two() -> None:
    out, lse = torch.randn(3, 5), torch.randn(3)
    nothing, never = torch.zeros(3, 5), torch.full((3,), -INF)
    for merged in (merge(out, lse, nothing, never), merge(nothing, never, out, lse)):
        torch.testing.assert_close(merged, (out, lse))
    both = merge(nothing, never, nothing, never)
    assert torch.equal(both[0], nothing)
    assert torch.equal(both[1], never)


def test_merge_has_gradients_where_neither_side_saw_a_key() -> None:
    out_a, out_b = torch.randn(2, 3), torch.randn(2, 3)
    lse_a, lse_b = torch.tensor([-INF, 0.5]), torch.tensor([-INF, -INF])
    leaves = [x.requires_grad_() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = merge(*leaves)
    (out.sum() + lse[1]).backward()
    assert torch.equal(out_a.grad, torch.tensor([[0.0] * 3, [1.0] * 3]))
    torch.testing.assert_close(lse_a.grad, torch.tensor([0.0, 1.0]))
    assert not out_b.grad.any()
    assert torch.equal(lse_b.grad, torch.zeros(2))


def test_merge_does_not_overflow_where_one_side_dwarfs_the_other() -> None:
    a, b = torch.ones(1, 2), torch.full((1, 2), 5.0)
    out, lse = merge(a, torch.tensor([1000.0]), b, torch.tensor([-1000.0]))
    torch.testing.assert_close(out, a)
    torch.testing.assert_close(lse, torch.tensor([1000.0]))


def test_merge_says_which_shapes_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"merge takes out \(\.\.\., D\) and lse \(\.\.\.\), got \(3, 5\) and \(4,\)"):
        merge(torch.zeros(3, 5), torch.zeros(4), torch.zeros(3, 5), torch.zeros(4))
