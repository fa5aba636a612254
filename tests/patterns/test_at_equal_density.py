"""At equal density the families stay themselves and different from one another.

How: any two share at most 85 % of the blocks of either together (Jaccard), at 256 blocks and 6 blocks a row or more;
sliding_window and sink_window, which are one but for the sinks, differ in every row that has a sink; and each family
keeps its own mark.
"""

import itertools
import math

import numpy as np
import pytest

from raybsa import patterns
from raybsa.patterns.catalog import CATALOG

FAMILIES = [name for name in CATALOG if name not in ("blocks", "union", "per_head")]
NUM_BLOCKS = 256
SETTINGS = [(density, causal) for density in (0.05, 0.1, 0.2, 0.4) for causal in (False, True)]
every_density = pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.4])
every_setting = pytest.mark.parametrize(("density", "causal"), SETTINGS)


def dense(rule, density, causal, blocks=NUM_BLOCKS):
    """(blocks, blocks) bool of head 0."""
    return patterns.build(rule).layout(blocks * 64, causal=causal, density=density).to_dense()[0].numpy()


def distances(kept):
    """Distances of kept blocks from the diagonal, 0 left out."""
    row, col = kept.nonzero()
    return np.abs(row - col)[row != col]


@every_setting
def test_any_two_families_differ(density, causal):
    kept = {name: dense(name, density, causal) for name in FAMILIES}
    for a, b in itertools.combinations(FAMILIES, 2):
        share = (kept[a] & kept[b]).sum() / (kept[a] | kept[b]).sum()
        limit = 0.99 if {a, b} == {"sliding_window", "sink_window"} else 0.85
        assert share <= limit, f"{a} and {b} share {share:.0%} of their blocks"


@every_setting
def test_a_sliding_window_is_one_run_around_the_diagonal(density, causal):
    for i, row in enumerate(dense("sliding_window", density, causal)):
        cols = row.nonzero()[0]
        assert (np.diff(cols) == 1).all()
        assert cols[0] <= i <= cols[-1]
        if not causal and cols[0] > 0 and cols[-1] < NUM_BLOCKS - 1:
            assert abs((i - cols[0]) - (cols[-1] - i)) <= 1


@every_setting
def test_a_sink_window_is_its_sinks_and_one_run(density, causal):
    for i, row in enumerate(dense({"name": "sink_window", "params": {"sink": 128}}, density, causal)):
        cols = row.nonzero()[0]
        sinks = min(2, len(cols) - 1)
        assert row[:sinks].all() or i < 2
        run = cols[cols >= 2]
        assert (np.diff(run) == 1).all()


@every_density
def test_dilated_leaves_its_segments_only_when_all_their_blocks_are_kept(density):
    rule = {"name": "dilated", "params": {"segment_lengths": [1024, 4096], "dilation_rates": [1, 4]}}
    scale = int(density * NUM_BLOCKS) / (1024 / 1 + 4096 / 4)  # natural blocks fill the smallest row
    block = np.arange(NUM_BLOCKS)
    for i, row in enumerate(dense(rule, density, causal=False)):
        own = np.zeros(NUM_BLOCKS, dtype=bool)
        for length, rate in ((1024, 1), (4096, 4)):
            size = max(rate + 1, round(scale * length))
            own |= (block // size == i // size) & ((block - i) % rate == 0)
        assert row[own].all() or not row[~own].any()


@every_setting
def test_strided_is_a_run_around_the_diagonal_and_every_stride_th_block(density, causal):
    stride = 8 * max(1, round(2 / (density * 8)))  # the multiple of 8 that takes half of the budget
    allowed = np.tri(NUM_BLOCKS, dtype=bool) if causal else np.ones((NUM_BLOCKS, NUM_BLOCKS), dtype=bool)
    far_rows = 0
    for i, row in enumerate(dense("strided", density, causal)):
        distance = np.abs(np.arange(NUM_BLOCKS) - i)
        reach = distance[row & (distance % stride != 0)].max(initial=0)
        assert row[(distance < reach) & allowed[i]].all()
        far_rows += (row & (distance > reach)).any()
    assert far_rows > 0.7 * (NUM_BLOCKS - stride)


@every_setting
def test_fixed_shows_the_last_column_of_each_span_to_all_later_rows(density, causal):
    span = 8 * max(1, round(2 / (density * 8)))
    for i, row in enumerate(dense("fixed", density, causal)):
        summaries = np.arange(span - 1, i + 1 if causal else NUM_BLOCKS, span)
        if row.sum() >= 2 * len(summaries) + 1:
            assert row[summaries].all()
        rest = row & (np.arange(NUM_BLOCKS) // span != i // span)
        assert not rest.any() or (rest.nonzero()[0] % span >= span / 2).all(), "others see the end of a span"


@every_setting
def test_global_blocks_are_whole_columns_and_diagonal(density, causal):
    kept = dense("global_blocks", density, causal)
    whole = int((np.tril(kept).sum(0) == NUM_BLOCKS - np.arange(NUM_BLOCKS)).argmin())
    assert whole >= 1
    rest = kept[whole + 1 :, whole + 1 :]
    assert rest.sum() <= len(rest), "beside the globals there is the diagonal only"
    if not causal:
        assert kept[: whole - 1].all(), "a global block sees all"


@every_setting
def test_bigbird_keeps_globals_first_then_near_and_random_blocks_in_turn(density, causal):
    kept = dense("bigbird", density, causal)
    assert kept[:, 0].all()
    assert kept[0].all() or causal
    counts = kept.sum(1)[16:]
    assert np.ptp(counts[counts < np.arange(17, NUM_BLOCKS + 1)] if causal else counts) <= 1
    assert kept.diagonal(-1)[16:].all(), "the nearest block is kept before another is drawn"
    far = distances(kept[1:, 1:])
    assert (far > NUM_BLOCKS / 4).mean() > 0.15


@every_setting
def test_random_rows_have_no_direction(density, causal):
    rows, cols = dense("random", density, causal, blocks=512).nonzero()
    place = (cols / np.where(causal, rows + 1, 512))[rows != cols]
    assert abs(place.mean() - 0.5) < 0.02
    assert abs(place.std() - 12**-0.5) < 0.02


@every_density
def test_chunked_leaves_its_chunk_only_when_all_of_it_is_kept(density):
    chunk = int(density * NUM_BLOCKS)
    for i, row in enumerate(dense("chunked", density, causal=False)):
        begin = i // chunk * chunk
        assert row[begin : begin + chunk].all()


@every_density
def test_vertical_slash_is_columns_and_diagonals(density):
    row, col = dense("vertical_slash", density, causal=False).nonzero()
    distance, spacing = np.abs(row - col), round(2 * NUM_BLOCKS**2 / len(row))
    vertical = (col % spacing == 0) | (col == 16)
    slash = (distance % spacing == spacing // 2) | np.isin(distance, (0, 8, 32))
    assert (vertical | slash).mean() > 0.9
    assert vertical.mean() > 0.3
    assert slash.mean() > 0.3


@every_setting
def test_power_of_two_is_as_fine_in_each_octave(density, causal):
    found = np.bincount(distances(dense("power_of_two", density, causal)), minlength=NUM_BLOCKS)
    assert (found[[1, 2, 4, 8]] > 0).all()
    per_octave = [np.sum(found[2**k : 2 ** (k + 1)] > NUM_BLOCKS / 4) for k in range(1, 5)]
    assert max(per_octave[1:3]) <= 4 * max(1, min(per_octave[1:3]))


@every_setting
def test_butterfly_flips_few_bits(density, causal):
    row, col = dense("butterfly", density, causal).nonzero()
    flipped = np.array([int(x).bit_count() for x in row ^ col])
    random_row, random_col = dense("random", density, causal).nonzero()
    by_chance = np.array([int(x).bit_count() for x in random_row ^ random_col])
    assert flipped.mean() < 0.8 * by_chance.mean()
    if not causal:  # one row is as another: all sets of a size come before the next size
        counts = np.bincount(flipped, minlength=9) / NUM_BLOCKS
        full = np.array([math.comb(8, size) for size in range(9)])
        assert ((counts > 0) & (counts < full)).sum() <= 1
        assert (np.diff(counts / full) <= 0).all()


@every_setting
def test_documents_are_left_only_when_all_of_them_is_kept(density, causal):
    rule = {"name": "document", "params": {"lengths": [1024, 512, 2048, 512]}}
    document = np.repeat(np.arange(16), [16, 8, 32, 8] * 4)
    for i, row in enumerate(dense(rule, density, causal)):
        own = (document == document[i]) & (np.arange(NUM_BLOCKS) <= (i if causal else NUM_BLOCKS))
        assert row[own].all() or not row[~own].any()
        gaps = np.diff(row[own].nonzero()[0])
        assert not len(gaps) or gaps.max() <= 2 + 2 * own.sum() / row[own].sum()


@every_setting
def test_dense_is_thinned_evenly(density, causal):
    for i, row in enumerate(dense("dense", density, causal)):
        cols = row.nonzero()[0]
        allowed = i + 1 if causal else NUM_BLOCKS
        if len(cols) > 2:
            assert np.diff(cols).max() <= 2 + allowed / (len(cols) - 1)


@every_setting
def test_a_union_shares_its_density_among_its_parts(density, causal):
    both = dense({"name": "union", "params": {"parts": ["chunked", "sliding_window"]}}, density, causal)
    for part in ("chunked", "sliding_window"):
        half = dense(part, density / 2, causal)
        assert (half & ~both).sum() <= 2, "each part is the member for half of it, to a block"


def test_heads_cycle_through_the_rules_of_per_head_and_keep_their_budgets():
    rules = [patterns.SlidingWindow(), patterns.Random(seed=3), patterns.GlobalBlocks()]
    for density in (None, 0.1):
        made = patterns.per_head(rules).layout(4096, num_heads=7, causal=True, density=density).to_dense()
        alone = [rule.layout(4096, num_heads=7, causal=True, density=density).to_dense() for rule in rules]
        for head in range(7):
            expected = alone[head % 3]
            assert made[head].equal(expected[head if len(expected) == 7 else 0])
