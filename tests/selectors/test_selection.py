"""Selection: tiles give what one sort of all scores gives, in layouts whose shape is known beforehand."""

import pytest
import torch

from raybsa.selectors import selection
from raybsa.selectors.rules import Rules
from raybsa.selectors.selection import best_columns, kept_columns, mean_probabilities, within_share
from raybsa.selectors.shape import Shape
from raybsa.timing import peak_bytes
from raybsa.variants.selector import BlockSelector

SEGMENTS = ((64, 1), (128, 2))


def vectors(rows: int, columns: int, batch: int = 2, heads: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, heads, rows, 8), torch.randn(batch, heads, columns, 8)


def sorted_at_once(u: torch.Tensor, w: torch.Tensor, shape: Shape) -> torch.Tensor:
    """(groups, rows, columns) bool: the specification, one row at a time."""
    wanted = shape.rules.preferences(u @ w.transpose(-1, -2), shape.rows).flatten(0, 1)
    kept = torch.zeros_like(wanted, dtype=torch.bool)
    for group, row in torch.cartesian_prod(torch.arange(len(kept)), torch.arange(len(shape.rows))).tolist():
        order = wanted[group, row].sort(dim=-1, descending=True, stable=True).indices
        kept[group, row, order[: shape.counts[row]]] = True
    return kept


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
@pytest.mark.parametrize(("q_len", "kv_len"), [(256, 256), (250, 121), (100, 250)])
@pytest.mark.parametrize("tile", [1, 200, 2**20])
def test_tiles_of_any_size_keep_what_one_sort_keeps(monkeypatch, causal, segments, q_len, kv_len, tile):
    monkeypatch.setitem(selection.TILE_SCORES, "cpu", tile)
    shape = Shape.make(Rules(16, causal, segments), q_len, kv_len, 0.3, "cpu")
    u, w = vectors(len(shape.rows), shape.columns)
    layout = shape.layout(kept_columns(u, w, shape)).validate()
    assert torch.equal(layout.to_dense(), sorted_at_once(u, w, shape))
    assert torch.equal(layout.row_counts, shape.counts.expand(6, -1))


def test_copies_repeat_each_group_in_a_row():
    shape = Shape.make(Rules(16, True), 256, 256, 0.3, "cpu")
    u, w = vectors(16, 16)
    col = kept_columns(u, w, shape)
    assert shape.layout(col, 3).digest() == shape.layout(col).repeat_heads(3).digest()


def test_a_part_of_the_rows_gets_what_the_whole_gives_them():
    rules, rows = Rules(16, True), torch.tensor([2, 3, 9, 15])
    whole, part = (Shape.make(rules, 247, 247, 0.3, "cpu", some) for some in (None, rows))
    u, w = vectors(16, 16)
    wanted = whole.layout(kept_columns(u, w, whole)).select(rows, None)
    assert part.layout(kept_columns(u[:, :, rows], w, part)).validate().digest() == wanted.digest()


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_everything_is_every_candidate(segments):
    shape = Shape.make(Rules(16, True, segments), 250, 250, 0.1, "cpu")
    layout = shape.everything(2).validate()
    assert torch.equal(layout.to_dense(), shape.rules.candidates(shape.rows, 16).expand(2, -1, -1))


def test_the_nearest_blocks_have_the_counts_of_a_selection():
    shape = Shape.make(Rules(16, True, sinks=0, window=1), 256, 256, 0.4, "cpu")
    layout = shape.nearest().validate()
    assert torch.equal(layout.row_counts[0], shape.counts)
    assert layout.to_dense()[0, 15].nonzero()[:, 0].tolist() == [12, 13, 14, 15]


def test_a_cap_keeps_forced_blocks_and_the_best_that_hold_the_share():
    rules = Rules(16, False, sinks=1, window=1)
    shape = Shape.make(rules, 256, 256, 0.5, "cpu")
    u, w = torch.zeros(1, 1, 16, 1), torch.zeros(1, 1, 16, 1)
    u[..., 0] = 1.0
    w[0, 0, 5], w[0, 0, 9] = 100.0, 99.0
    best = best_columns(u, w, shape)
    for share, free in ((0.5, [5]), (0.9, [5, 9])):
        layout = shape.capped_layout(best, within_share(u, w, shape, best, share, 1.0)).validate()
        assert layout.to_dense()[0, 12].nonzero()[:, 0].tolist() == [0, *free, 12]
    copied = shape.capped_layout(best, within_share(u, w, shape, best, 0.9, 1.0), 2)
    assert copied.digest() == layout.repeat_heads(2).digest()


def test_a_whole_share_caps_nothing():
    shape = Shape.make(Rules(16, True), 250, 250, 0.4, "cpu")
    u, w = vectors(16, 16)
    best = best_columns(u, w, shape)
    capped = shape.capped_layout(best, within_share(u, w, shape, best, 1.0 + 1e-6, 1.0))
    assert capped.digest() == shape.layout(shape.columns_of(best)).digest()


def test_probabilities_are_means_over_samples_and_sum_to_one_over_free_blocks():
    shape = Shape.make(Rules(16, True, sinks=1, window=2), 256, 256, 0.4, "cpu")
    u, w = vectors(16, 16)
    odds = torch.cat([tile for _, tile in mean_probabilities(u, w, shape, 0.5)], 2)
    assert odds.shape == (1, 3, 16, 16)
    assert not odds[..., 0].any()
    assert not odds.diagonal(dim1=-2, dim2=-1).any()
    torch.testing.assert_close(odds.sum(-1)[:, :, 3:], torch.ones(1, 3, 13))
    of_row = torch.softmax(torch.einsum("bd,bjd->bj", u[:, 1, 9], w[:, 1, 1:8]) / 0.5, -1).mean(0)
    torch.testing.assert_close(odds[0, 1, 9, 1:8], of_row)


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    """With a bounded number of blocks a row, selection at twice the length takes about twice the bytes."""
    found = []
    for tokens in (32_768, 65_536):
        selector = BlockSelector(1, 16, block_size=16, causal=True, max_blocks=8, density=0.5, method="mean-pool")
        q = torch.randn(1, 1, tokens, 16)
        with torch.no_grad():
            selector.select(q, q)
            found.append(peak_bytes(lambda selector=selector, q=q: selector.select(q, q), "cpu"))
    squared = (65_536 // 16) ** 2
    assert found[1] < 2.5 * found[0]
    assert found[1] < 4 * squared, "not even one float32 a pair of blocks"
