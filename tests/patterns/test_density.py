"""A density: kept / allowed blocks of a head, exact in total, in a family's own shape."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from raybsa import patterns
from raybsa.patterns.catalog import CATALOG
from tests.patterns.test_every_family import GEOMETRIES, SPECS, diagonal_and_allowed, make

DENSITIES = (0.005, 0.07, 0.25, 0.6, 1.0)
EVEN = ("sliding_window", "sink_window", "random", "power_of_two", "butterfly", "dense")  # also where causal
GLOBAL = ("global_blocks", "bigbird")  # rows differ, causal or not
BLOCK = 16

every_rule = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
both_causalities = pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])


@every_rule
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@both_causalities
def test_every_head_keeps_its_density_to_half_a_block_or_says_what_is_near(spec, geometry, causal):
    allowed = sum(count for _, count in diagonal_and_allowed(geometry, causal))
    smallest = make(spec, geometry, causal, density=1e-9).row_counts.sum(1).max().item()
    for density in DENSITIES:
        if round(density * allowed) < smallest:
            with pytest.raises(ValueError, match=f"at least {smallest} of the {allowed} blocks .* density from"):
                make(spec, geometry, causal, density, or_least=False)
        else:
            counts = make(spec, geometry, causal, density, or_least=False).row_counts.sum(1)
            assert (counts == round(density * allowed)).all()


@pytest.mark.parametrize("name", [name for name in SPECS if name in CATALOG])
@pytest.mark.parametrize(("length", "block"), [(1024, 16), (5000, 64), (131072, 512)])
def test_long_and_ragged_causal_sequences_keep_their_density(name, length, block):
    num_blocks = -(-length // block)
    allowed = num_blocks * (num_blocks + 1) // 2
    for density in (0.03, 0.05, 0.1, 0.3, 0.9):
        made = patterns.build(SPECS[name]).layout(
            length, num_heads=2, q_block_size=block, causal=True, density=density, or_least=True
        )
        kept = made.validate().row_counts.sum(1)
        assert (kept == max(round(density * allowed), least(name, length, block))).all()


def least(name, length, block):
    made = patterns.build(SPECS[name]).layout(length, q_block_size=block, causal=True, density=1e-9, or_least=True)
    return int(made.row_counts.sum(1).max())


@pytest.mark.parametrize("name", [name for name in SPECS if name in CATALOG])
@both_causalities
def test_rows_are_even_and_odd_blocks_evenly_spread_where_the_shape_lets_them(name, causal):
    if name in (*GLOBAL, "per_head") or (causal and name not in EVEN):
        return
    for density in (0.2, 0.33, 0.71):
        made = make(SPECS[name], GEOMETRIES["ragged"], causal, density)
        allowed = made.allowed_blocks
        for counts in made.row_counts:
            free = counts[counts < allowed]
            assert free.max() - free.min() <= 1 or name == "union"
            more = (free == free.max()).nonzero()[:, 0]
            if 1 < len(more) < len(free):
                assert np.ptp(more.diff().numpy()) <= 1


# ---- shapes: what a causal row keeps, as a formula of i (query block) and j (KV block) ---------------------------


def distance(i, j):
    return i - j


def in_sliding_window(rule, i, j):
    return distance(i, j) <= rule.window // BLOCK


def in_sink_window(rule, i, j):
    return in_sliding_window(rule, i, j) | (j < rule.sink // BLOCK)


def in_chunked(rule, i, j):
    chunk, shift = rule.chunk // BLOCK, rule.shift // BLOCK
    return (i + shift) // chunk == (j + shift) // chunk


def in_dilated(rule, i, j):
    found = np.zeros(np.broadcast(i, j).shape, dtype=bool)
    for length, rate in zip(rule.segment_lengths, rule.dilation_rates, strict=True):
        size = length // BLOCK
        found |= (i // size == j // size) & (distance(i, j) % rate == 0)
    return found


def in_strided(rule, i, j):
    return (distance(i, j) % rule.stride == 0) | (distance(i, j) <= rule.near)


def in_fixed(rule, i, j):
    number = j // rule.span
    ends = np.floor((number + 1) * rule.summary + 1e-9) - np.floor(number * rule.summary + 1e-9)
    is_summary = (j % rule.span >= rule.span - ends) & (i // rule.span > number)
    own = (i // rule.span == number) & (True if rule.near is None else distance(i, j) <= rule.near)
    return own | is_summary


def in_vertical_slash(rule, i, j):
    offsets = [offset // BLOCK for offset in rule.offsets]
    return np.isin(j, [column // BLOCK for column in rule.columns]) | np.isin(distance(i, j), offsets)


def in_global_blocks(rule, i, j):
    return j < rule.num_globals


SHAPES = {
    "sliding_window": ({}, in_sliding_window),
    "sink_window": ({"sink": 48}, in_sink_window),
    "chunked": ({}, in_chunked),
    "shifted chunks": ({"shift": 512}, in_chunked),
    "dilated": ({}, in_dilated),
    "dilated, other rates": ({"segment_lengths": [100, 350], "dilation_rates": [2, 3]}, in_dilated),
    "strided": ({}, in_strided),
    "fixed": ({}, in_fixed),
    "fixed, long summaries": ({"summary": 3}, in_fixed),
    "vertical_slash": ({}, in_vertical_slash),
    "global_blocks": ({}, in_global_blocks),
}
FAMILY = {"shifted chunks": "chunked", "dilated, other rates": "dilated", "fixed, long summaries": "fixed"}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [2048, 6000])
def test_a_causal_density_keeps_the_shape_of_one_member_and_spreads_the_rest(name, length):
    params, formula = SHAPES[name]
    rule = patterns.build({"name": FAMILY.get(name, name), "params": params})
    j = np.arange(-(-length // BLOCK))
    i, seen = j[:, None], j <= j[:, None]
    for density in (0.07, 0.1, 0.23, 0.5):
        member = rule.member(length, density=density, q_block_size=BLOCK, causal=True)
        shape = (formula(member, i, j) | (i == j)) & seen
        kept = rule.layout(length, density=density, q_block_size=BLOCK, causal=True).to_dense()[0].numpy()
        assert not (shape & ~kept).any(), "every block of the member is kept"
        more = (kept & ~shape).sum(1)
        room = shape.sum(1) < j + 1
        assert np.ptp(more[room]) <= 1, "what is left goes to all rows alike"
        assert more.max() <= (1 if formula in (in_sliding_window, in_sink_window) else 2)


@pytest.mark.parametrize("name", [name for name in SPECS if name in CATALOG and name not in ("union", "per_head")])
def test_a_members_own_layout_says_as_much_as_the_density(name):
    rule = patterns.build(name)
    member = rule.member(4096, density=0.2, q_block_size=BLOCK, causal=True)
    if member == rule:
        assert not rule.free
        return
    own = member.layout(4096, q_block_size=BLOCK, causal=True)
    assert 0.9 * 0.2 < own.density <= 0.2 + 1e-9
    kept = rule.layout(4096, q_block_size=BLOCK, causal=True, density=0.2)
    assert not (own.to_dense() & ~kept.to_dense()).any() or name == "bigbird"


@pytest.mark.parametrize(
    "rule",
    [
        patterns.SlidingWindow(416),
        patterns.SinkWindow(32, 240),
        patterns.Random(7),
        patterns.Chunked(640),
        patterns.GlobalBlocks(5),
    ],
    ids=lambda rule: rule.family,
)
def test_a_patterns_own_density_leads_back_to_its_parameters(rule):
    own = rule.layout(4096, q_block_size=BLOCK, causal=True)
    free = type(rule)(**{k: v for k, v in rule.params().items() if k not in rule.free})
    again = free.layout(4096, q_block_size=BLOCK, causal=True, density=own.density)
    assert again.digest() == own.digest()
    assert free.member(4096, density=own.density, q_block_size=BLOCK, causal=True) == rule


@every_rule
@both_causalities
def test_a_larger_density_keeps_more(spec, causal):
    counts = [
        make(spec, GEOMETRIES["ragged"], causal, density).row_counts for density in (0.3, 0.301, 0.35, 0.5, 0.8, 1.0)
    ]
    for fewer, more in pairwise(counts):
        assert (fewer.sum(1) <= more.sum(1)).all()
    assert (counts[0] <= counts[-1]).all()


def test_a_rule_of_ones_own_is_cut_evenly_below_its_density_and_filled_evenly_above():
    rule = patterns.Document((256, 128))
    own = rule.layout(1024, q_block_size=16, causal=True)
    counts = own.row_counts[0]
    below = rule.layout(1024, q_block_size=16, causal=True, density=0.5 * own.density).row_counts[0]
    assert (below <= counts).all()
    assert below[below < counts].max() - below[below < counts].min() <= 1
    above = rule.layout(1024, q_block_size=16, causal=True, density=3 * own.density)
    assert not (own.to_dense() & ~above.to_dense()).any()
    more = (above.row_counts[0] - counts)[above.row_counts[0] < above.allowed_blocks]
    assert more.max() - more.min() <= 1


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        (patterns.SlidingWindow(256), "sliding_window was given window=256 and density=0.1"),
        (patterns.BigBird(num_random=5), "num_random=5 and density=0.1"),
        (patterns.SlidingWindow(256) | patterns.Dense(), "window=256"),
        (patterns.per_head([patterns.Dense(), patterns.Chunked(64)]), "chunk=64"),
    ],
)
def test_a_density_beside_the_parameter_that_it_sets_is_refused(rule, named):
    with pytest.raises(ValueError, match=f"{named}.*give one of the two"):
        rule.layout(4096, causal=True, density=0.1)


def test_an_attention_serves_sequences_too_short_for_its_density():
    from raybsa import create_block_sparse_attention

    attend = create_block_sparse_attention(pattern="sink_window", density=0.05, block_size=16, causal=True)
    q = torch.randn(1, 2, 40, 8)
    assert attend(q, q, q).shape == q.shape
