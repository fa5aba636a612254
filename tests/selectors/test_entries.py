"""Entries: scores, softmax over a row's blocks, and the order of query heads."""

import torch

from raybsa.layout import BlockLayout
from raybsa.selectors.entries import Entries


def random_layout(groups: int = 6) -> BlockLayout:
    mask = torch.rand(groups, 8, 10) < 0.4
    return BlockLayout.from_dense(mask, q_len=128, kv_len=160, q_block_size=16)


def test_scores_are_dot_products_of_the_blocks_vectors():
    layout = random_layout()
    u, w = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 10, 4)
    group, row, col = layout.coordinates()
    wanted = (u @ w.transpose(-1, -2)).flatten(0, 1)[group, row, col]
    torch.testing.assert_close(Entries.of(layout).scores(u, w), wanted)


def test_log_softmax_is_over_the_counted_entries_of_each_row_and_differentiable():
    layout = random_layout()
    entries = Entries.of(layout)
    scores = (torch.randn(layout.nnz_blocks, dtype=torch.float64) * 30).requires_grad_()
    counted = torch.rand(layout.nnz_blocks) < 0.7
    dense = torch.full((6, 8, 10), -torch.inf, dtype=torch.float64).index_put(
        layout.coordinates(), torch.where(counted, scores, -torch.inf)
    )
    wanted = torch.where(counted, dense.log_softmax(-1)[layout.coordinates()], 0.0)
    found = entries.log_softmax(scores, counted)
    torch.testing.assert_close(found, wanted)
    weights = torch.rand(layout.nnz_blocks, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((x * weights)[counted].sum(), scores)[0] for x in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_values_go_to_the_query_heads_and_their_mean_comes_back():
    layout = random_layout()
    entries, copies = Entries.of(layout), 3
    group, row, col = layout.coordinates()
    names = group * 1000.0 + row * 10 + col
    g, r, c = layout.repeat_heads(copies).coordinates()
    assert torch.equal(entries.over_heads(names, copies), (g // copies) * 1000.0 + r * 10 + c)
    values = torch.randn(layout.nnz_blocks * copies)
    wanted = torch.stack([values[(g // copies * 1000 + r * 10 + c) == name].mean() for name in names.tolist()])
    torch.testing.assert_close(entries.mean_of_heads(values, copies), wanted)


def test_rows_at_hand_keep_their_global_numbers():
    part = random_layout(1).select(torch.tensor([2, 5]), None)
    entries = Entries.of(part)
    assert set(entries.q_block.tolist()) <= {2, 5}
    assert set(entries.row.tolist()) <= {0, 1}
