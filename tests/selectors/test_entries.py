"""Entries as a list and as a table: scores, and the order of query heads."""

import torch

from raybsa.layout import BlockLayout
from raybsa.selectors.entries import Entries, Table


def random_layout(groups: int = 6) -> BlockLayout:
    mask = torch.rand(groups, 8, 10) < 0.4
    return BlockLayout.from_dense(mask, q_len=128, kv_len=160, q_block_size=16)


def test_scores_are_dot_products_of_the_blocks_vectors():
    layout = random_layout()
    u, w = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 10, 4)
    group, row, col = layout.coordinates()
    wanted = (u @ w.transpose(-1, -2)).flatten(0, 1)[group, row, col]
    torch.testing.assert_close(Entries.of(layout).scores(u, w), wanted)


def test_a_table_holds_every_rows_blocks_and_their_scores():
    layout = random_layout()
    table = Table.of(layout, 10)
    columns = table.take(layout.col_indices)
    dense = torch.zeros(6, 8, 11, dtype=torch.bool).scatter_(2, columns.masked_fill(table.beyond, 10).long(), True)
    assert torch.equal(dense[..., :10], layout.to_dense())
    u, w = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 10, 4)
    wanted = (u @ w.transpose(-1, -2)).flatten(0, 1).gather(2, columns.long())
    torch.testing.assert_close(table.scores(u, w, columns), wanted)


def test_values_go_to_the_query_heads():
    layout = random_layout()
    entries, copies = Entries.of(layout), 3
    group, row, col = layout.coordinates()
    names = group * 1000.0 + row * 10 + col
    g, r, c = layout.repeat_heads(copies).coordinates()
    assert torch.equal(entries.over_heads(names, copies), (g // copies) * 1000.0 + r * 10 + c)


def test_rows_at_hand_keep_their_global_numbers():
    part = random_layout(1).select(torch.tensor([2, 5]), None)
    entries = Entries.of(part)
    assert set(entries.q_block.tolist()) <= {2, 5}
    assert set(entries.row.tolist()) <= {0, 1}
    assert Table.of(part, 10).q_block.flatten().tolist() == [2, 5]
