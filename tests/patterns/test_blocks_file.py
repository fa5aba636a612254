"""Explicit lists of blocks in files."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from raybsa import patterns
from raybsa.layout import BlockLayout


@pytest.fixture
def learned():
    """Three heads, ragged, unequal block sizes, and rows without blocks."""
    mask = torch.rand(3, 7, 13) < 0.3
    mask[1, 4] = False
    return BlockLayout.from_dense(mask, q_len=100, kv_len=98, q_block_size=16, kv_block_size=8)


def like(layout, rule, **changes):
    sizes = {"kv_len": 98, "q_block_size": 16, "kv_block_size": 8, "num_heads": 3} | changes
    return rule.layout(layout.q_len, **sizes)


def test_a_saved_layout_comes_back_with_its_diagonal(learned, tmp_path):
    rule = patterns.save_blocks(learned, tmp_path / "learned.parquet")
    made = like(learned, patterns.build(rule.spec))
    diagonal = like(learned, patterns.SlidingWindow(window=1))
    assert made.digest() == (learned | diagonal).digest()


def test_a_causal_layout_drops_what_lies_above(learned, tmp_path):
    rule = patterns.save_blocks(learned, tmp_path / "learned.parquet")
    made = like(learned, rule, causal=True).validate()
    assert made.to_dense().equal(
        like(learned, rule).to_dense() & like(learned, patterns.Dense(), causal=True).to_dense()
    )


def test_one_group_serves_any_heads_and_parts_of_a_composition(tmp_path):
    shared = patterns.Butterfly().layout(640)
    rule = patterns.save_blocks(shared, tmp_path / "shared.parquet")
    assert rule.layout(640, num_heads=12).digest() == shared.digest()
    mixed = patterns.per_head([rule, patterns.Dense()]).layout(640, num_heads=4).to_dense()
    assert mixed[0].equal(mixed[2])
    assert mixed[2].equal(shared.to_dense()[0])
    assert mixed[3].all()


def test_a_list_by_head_gives_each_head_its_own_in_a_composition(learned, tmp_path):
    rule = patterns.save_blocks(learned, tmp_path / "learned.parquet")
    mixed = like(learned, patterns.per_head([patterns.SlidingWindow(window=1), rule]))
    alone = like(learned, rule)
    assert mixed.to_dense()[1].equal(alone.to_dense()[1])


def test_a_density_keeps_the_nearest_of_the_list_first(tmp_path):
    rows = [[0, 5, 9], [1, 9], [2, 0, 9], [3], [4, 0], [5, 4, 3, 2, 1, 0], [6], [7], [8, 0], [9]]
    listed = BlockLayout.from_rows(rows, q_len=160, kv_len=160, q_block_size=16)
    rule = patterns.save_blocks(listed, tmp_path / "rows.parquet")
    made = rule.layout(160, q_block_size=16, density=0.3).to_dense()[0]
    kept = [row.nonzero()[:, 0].tolist() for row in made]
    expected = [
        [0, 5, 9],
        [0, 1, 9],
        [0, 2, 9],
        [2, 3, 4],
        [0, 3, 4],
        [3, 4, 5],
        [5, 6, 7],
        [6, 7, 8],
        [0, 7, 8],
        [7, 8, 9],
    ]
    assert kept == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_len": 104}, "lists blocks for kv_len 98, got 104"),
        ({"kv_block_size": 16}, "lists blocks for kv_block_size 8, got 16"),
        ({"num_heads": 2}, "lists blocks for 3 heads, got 2"),
    ],
)
def test_a_layout_that_the_list_was_not_made_for_is_refused(learned, tmp_path, changes, message):
    rule = patterns.save_blocks(learned, tmp_path / "learned.parquet")
    with pytest.raises(ValueError, match=message):
        like(learned, rule, **changes)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"blocks needs a file saved by save_blocks, got path '.*absent"):
        patterns.Blocks(str(tmp_path / "absent"))
    (tmp_path / "text").write_text("0 1\n")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        patterns.Blocks(str(tmp_path / "text"))
    pq.write_table(pa.table({"row": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match=r"must be a list of blocks saved by save_blocks, it has columns \['row'\]"):
        patterns.Blocks(str(tmp_path / "foreign.parquet"))


def test_a_selection_is_not_saved(learned, tmp_path):
    with pytest.raises(ValueError, match="takes a whole layout"):
        patterns.save_blocks(learned.select(torch.tensor([0, 2]), None), tmp_path / "part.parquet")
