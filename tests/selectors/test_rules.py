"""Rules: which blocks may be kept, which must, and how many."""

import pytest
import torch

from raybsa import patterns
from raybsa.patterns.grid import Grid
from raybsa.selectors.rules import Rules

LENGTHS = [(256, 256), (256, 100), (100, 256), (250, 250)]


def blocks(tokens: int) -> int:
    return -(-tokens // 16)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_candidates_are_the_dilated_patterns_own_blocks(q_len, kv_len, causal):
    lengths, rates = [32, 128], [1, 3]
    dilated = patterns.build({"name": "dilated", "params": {"segment_lengths": lengths, "dilation_rates": rates}})
    wanted = dilated.layout(q_len, kv_len, q_block_size=16, causal=causal).to_dense()[0]
    rules = Rules(16, causal, tuple(zip(lengths, rates, strict=True)))
    assert torch.equal(rules.candidates(torch.arange(blocks(q_len)), blocks(kv_len)), wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("density", [0.33, 0.5, 1.0])
def test_a_rows_budget_is_that_of_fixed_patterns_but_for_where_the_odd_blocks_go(q_len, kv_len, causal, density):
    grid = Grid(q_len, kv_len, 16, 16, causal, 1, (0,), torch.device("cpu"))
    rules = Rules(16, causal)
    rows = torch.arange(blocks(q_len))
    fixed = patterns.SlidingWindow().layout(q_len, kv_len, q_block_size=16, causal=causal, density=density)
    counts = rules.budget(rows, len(rows), blocks(kv_len), density)
    assert counts.sum() == fixed.row_counts.sum()
    assert (counts - fixed.row_counts[0]).abs().max() <= 1
    assert torch.equal(rules.allowed(rows, blocks(kv_len)), grid.allowed)


def test_a_budget_never_passes_the_candidates_or_max_blocks():
    rows = torch.arange(16)
    within = Rules(16, False, ((64, 1),)).budget(rows, 16, 16, 1.0)
    assert within.tolist() == [4] * 16
    assert Rules(16, False, max_blocks=3).budget(rows, 16, 16, 0.5).tolist() == [3] * 16


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [None, ((64, 1),)])
@pytest.mark.parametrize("max_blocks", [None, 3])
@pytest.mark.parametrize("density", [0.01, 0.13, 0.5, 1.0])
def test_an_even_budget_is_exact_in_total_and_the_same_in_all_rows_that_have_the_candidates(
    causal, segments, max_blocks, density
):
    rules = Rules(16, causal, segments, max_blocks=max_blocks)
    rows = torch.arange(20)
    counts = rules.budget(rows, 20, 20, density)
    most = rules.candidates(rows, 20).sum(1).clamp(max=max_blocks or 20)
    wanted = round(density * (210 if causal else 400))
    assert counts.sum() == min(max(wanted, 20), int(most.sum()))
    assert (counts <= most).all()
    assert (counts >= 1).all()
    free = counts[counts < most]
    assert len(free) == 0 or counts.max() <= free.min() + 1
    assert (free.diff() >= 0).all(), "the last rows have one more"
    some = torch.tensor([3, 17])
    assert torch.equal(rules.budget(some, 20, 20, density), counts[some])


@pytest.mark.parametrize("causal", [False, True])
def test_forced_blocks_come_first_then_scores_and_what_may_not_be_kept_last(causal):
    rules = Rules(16, causal, sinks=2, window=3)
    scores = torch.randn(10, 10) * 1e6
    wanted = rules.preferences(scores, torch.arange(10))
    order = wanted[7].argsort(descending=True).tolist()
    near = [7, 0, 1, 6, 5] if causal else [7, 0, 1, 6, 8, 5, 9]
    assert order[: len(near)] == near
    free = [j for j in range(8 if causal else 10) if j not in near]
    assert order[len(near) : len(near) + len(free)] == sorted(free, key=lambda j: -scores[7, j])
    assert (wanted[7] == -torch.inf).sum() == (2 if causal else 0)


def test_a_segment_bounds_forced_blocks_too():
    rules = Rules(16, True, ((64, 1),), sinks=1, window=2)
    assert rules.preferences(torch.zeros(1, 16), torch.tensor([9])).isfinite().nonzero()[:, 1].tolist() == [8, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 48}, "power of two, got 48"),
        ({"sinks": -1}, "sinks must be an integer >= 0, got -1"),
        ({"window": 0}, "window must be an integer >= 1, got 0"),
        ({"max_blocks": 0}, "max_blocks must be an integer >= 1, got 0"),
        ({"sinks": 5000}, "at most 2048 blocks, got 5000, 1"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Rules(**{"block_size": 16, "causal": True, **arguments})
