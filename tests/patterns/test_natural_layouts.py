"""Every family against its rule written out token by token: a block is kept iff some token pair in it satisfies it."""

import bisect
import itertools

import numpy as np
import pytest

from raybsa import patterns

GEOMETRIES = {  # q_len, kv_len, q_block_size, kv_block_size
    "square": (128, 128, 16, 16),
    "ragged": (120, 120, 16, 16),
    "more_keys": (90, 160, 16, 16),
    "more_queries": (160, 90, 16, 16),
    "large_q_blocks": (150, 130, 32, 8),
    "large_kv_blocks": (130, 150, 8, 32),
    "far_queries": (150, 30, 32, 8),
}


def documents_of(token, lengths):
    ends = list(itertools.accumulate(lengths))
    return token // ends[-1], bisect.bisect_right(ends, token % ends[-1])


# what query token i sees of key token j; b is kv_block_size
RULES = {
    "sliding_window": [({"window": w}, lambda i, j, b, w=w: abs(i - j) < w) for w in (1, 13, 40, 1000)],
    "sink_window": [
        ({"sink": s, "window": w}, lambda i, j, b, s=s, w=w: j < s or abs(i - j) < w) for s, w in ((5, 9), (33, 20))
    ],
    "dilated": [
        (
            {"segment_lengths": w, "dilation_rates": r},
            lambda i, j, b, w=w, r=r: any(
                i // x == j // x and (i // b - j // b) % y == 0 for x, y in zip(w, r, strict=True)
            ),
        )
        for w, r in (([32, 64], [1, 2]), ([20, 50, 110], [1, 3, 5]), ([7], [2]))
    ],
    "global_blocks": [({"num_globals": g}, lambda i, j, b, g=g: i // b < g or j // b < g) for g in (1, 3, 100)],
    "strided": [
        ({"stride": s}, lambda i, j, b, s=s: abs(i // b - j // b) <= s or (i // b - j // b) % s == 0) for s in (1, 3, 4)
    ],
    "fixed": [
        (
            {"span": s, "summary": c},
            lambda i, j, b, s=s, c=c: i // b // s == j // b // s or j // b % s >= s - c,
        )
        for s, c in ((3, 1), (4, 2), (1, 1))
    ],
    "chunked": [
        ({"chunk": c, "shift": s}, lambda i, j, b, c=c, s=s: (i + s) // c == (j + s) // c)
        for c, s in ((32, 0), (40, 7), (50, 49))
    ],
    "vertical_slash": [
        (
            {"columns": c, "offsets": o},
            lambda i, j, b, c=tuple(c), o=tuple(o): j in c or abs(i - j) in o,
        )
        for c, o in (([0, 70], [0, 40]), ([25, 149], [3, 100, 17]))
    ],
    "power_of_two": [({}, lambda i, j, b: abs(i // b - j // b).bit_count() <= 1)],
    "butterfly": [({}, lambda i, j, b: (i // b ^ j // b).bit_count() <= 1)],
    "document": [
        ({"lengths": n}, lambda i, j, b, n=tuple(n): documents_of(i, n) == documents_of(j, n))
        for n in ([40], [10, 33, 5], [1, 300])
    ],
    "dense": [({}, lambda i, j, b: True)],
}
CASES = [
    pytest.param(name, params, rule, id=f"{name}-{number}")
    for name, cases in RULES.items()
    for number, (params, rule) in enumerate(cases)
]


def blocks_by_token(rule, geometry, causal):
    q_len, kv_len, q_size, kv_size = geometry
    seen = np.array([[rule(i, j, kv_size) and (j <= i or not causal) for j in range(kv_len)] for i in range(q_len)])
    rows, cols = -(-q_len // q_size), -(-kv_len // kv_size)
    blocks = np.zeros((rows, cols), dtype=bool)
    for i, j in itertools.product(range(rows), range(cols)):
        blocks[i, j] = seen[i * q_size : (i + 1) * q_size, j * kv_size : (j + 1) * kv_size].any()
    for i in range(q_len):  # and the diagonal
        blocks[i // q_size, min(i // kv_size, cols - 1)] = True
    return blocks


@pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize(("name", "params", "rule"), CASES)
def test_a_block_is_kept_iff_some_token_pair_in_it_satisfies_the_rule(name, params, rule, geometry, causal):
    q_len, kv_len, q_size, kv_size = geometry
    made = patterns.build({"name": name, "params": params}).layout(
        q_len, kv_len, q_block_size=q_size, kv_block_size=kv_size, causal=causal
    )
    made.validate()
    np.testing.assert_array_equal(made.to_dense()[0].numpy(), blocks_by_token(rule, geometry, causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_random_keeps_the_diagonal_and_as_many_others_as_asked_in_each_row_and_head(geometry, causal):
    q_len, kv_len, q_size, kv_size = geometry
    shape = {"q_block_size": q_size, "kv_block_size": kv_size, "causal": causal}
    made = patterns.Random(num_random=3, seed=5).layout(q_len, kv_len, num_heads=4, **shape).validate()
    diagonal = blocks_by_token(lambda i, j, b: False, geometry, causal)
    allowed = blocks_by_token(lambda i, j, b: True, geometry, causal).sum(1)
    dense = made.to_dense().numpy()
    assert dense.shape[0] == 4
    assert (dense | ~diagonal).all()
    np.testing.assert_array_equal(dense.sum(2), np.tile(np.minimum(diagonal.sum(1) + 3, allowed), (4, 1)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_bigbird_is_window_and_globals_and_random(geometry, causal):
    q_len, kv_len, q_size, kv_size = geometry
    shape = {"q_block_size": q_size, "kv_block_size": kv_size, "causal": causal}
    bigbird = patterns.BigBird(window=20, num_globals=2, num_random=2, seed=9)
    made = bigbird.layout(q_len, kv_len, num_heads=3, **shape).validate()
    drawn = patterns.Random(num_random=2, seed=9).layout(q_len, kv_len, num_heads=3, **shape).to_dense().numpy()
    certain = blocks_by_token(lambda i, j, b: abs(i - j) < 20 or min(i // b, j // b) < 2, geometry, causal)
    np.testing.assert_array_equal(made.to_dense().numpy(), drawn | certain)


def test_heads_of_a_random_pattern_differ_and_seeds_do_too():
    made = [patterns.Random(num_random=4, seed=seed).layout(4096, num_heads=4).to_dense() for seed in (0, 1)]
    heads = [head for dense in made for head in dense]
    for a, b in itertools.combinations(heads, 2):
        assert not a.equal(b)
    assert made[0].equal(patterns.Random(num_random=4, seed=0).layout(4096, num_heads=6).to_dense()[:4])
