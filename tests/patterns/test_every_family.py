"""One suite for every entry of the catalog, and for compositions."""

import copy
import json
import pickle

import pytest
import torch

from raybsa import patterns
from raybsa.patterns.catalog import CATALOG

FAMILIES = [name for name in CATALOG if name not in ("blocks", "union", "per_head")]
SPECS = {name: {"name": name, "params": {}} for name in FAMILIES}
SPECS["union"] = {"name": "union", "params": {"parts": [SPECS["sink_window"], SPECS["random"], SPECS["butterfly"]]}}
SPECS["per_head"] = {"name": "per_head", "params": {"parts": [SPECS["bigbird"], SPECS["strided"], SPECS["union"]]}}
SPECS["dilated_shifted_chunks"] = {
    "name": "union",
    "params": {
        "parts": [
            {"name": "dilated", "params": {"segment_lengths": [64, 192], "dilation_rates": [1, 3]}},
            {"name": "chunked", "params": {"shift": 400}},
        ]
    },
}
GEOMETRIES = {  # q_len, kv_len, q_block_size, kv_block_size
    "square": (1024, 1024, 32, 32),
    "ragged": (1000, 1000, 32, 32),
    "more_keys": (500, 1100, 16, 16),
    "more_queries": (1100, 500, 16, 16),
    "large_q_blocks": (1000, 900, 128, 16),
    "large_kv_blocks": (900, 1000, 16, 128),
    "one_block": (40, 40, 64, 64),
}

every_rule = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
both_causalities = pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])


def make(spec, geometry, causal=False, density=None, num_heads=3, device=None, or_least=True):
    q_len, kv_len, q_block_size, kv_block_size = geometry
    return patterns.build(spec).layout(
        q_len,
        kv_len,
        num_heads=num_heads,
        q_block_size=q_block_size,
        kv_block_size=kv_block_size,
        causal=causal,
        density=density,
        or_least=or_least,
        device=device,
    )


def diagonal_and_allowed(geometry, causal):
    """For each query block: its diagonal KV blocks and how many it may keep, counted one by one."""
    q_len, kv_len, q_size, kv_size = geometry
    cols = -(-kv_len // kv_size)
    for begin in range(0, q_len, q_size):
        tokens = range(begin, min(begin + q_size, q_len))
        diagonal = sorted({min(token // kv_size, cols - 1) for token in tokens})
        yield diagonal, sum(not causal or col * kv_size <= tokens[-1] for col in range(cols))


@every_rule
@every_geometry
@both_causalities
def test_every_row_keeps_its_diagonal_and_nothing_above_it(spec, geometry, causal):
    for density in (None, 0.01, 0.3):
        made = make(spec, geometry, causal, density).validate()
        for head in made.to_dense().numpy():
            for row, (diagonal, allowed) in zip(head, diagonal_and_allowed(geometry, causal), strict=True):
                kept = int(row[diagonal].sum())
                assert kept == min(len(diagonal), int(row.sum())), "the diagonal is dropped last"
                assert row[diagonal[:kept]].all(), "the first of its blocks is kept longest"
                assert not row[allowed:].any()


@every_rule
@both_causalities
def test_density_one_keeps_every_allowed_block(spec, causal):
    made = make(spec, GEOMETRIES["ragged"], causal, density=1.0)
    assert made.density == 1.0


@every_rule
@both_causalities
@pytest.mark.parametrize("density", [None, 0.2])
def test_a_layout_is_the_same_every_time_and_from_its_spec(spec, causal, density):
    rule = patterns.build(spec)
    digest = make(rule, GEOMETRIES["ragged"], causal, density).digest()
    assert make(rule, GEOMETRIES["ragged"], causal, density).digest() == digest
    through_json = json.loads(json.dumps(rule.spec.to_dict()))
    for again in (patterns.build(rule.spec), patterns.build(through_json), pickle.loads(pickle.dumps(rule))):
        assert again == rule
        assert hash(again) == hash(rule)
        assert again.spec == rule.spec
        assert make(again, GEOMETRIES["ragged"], causal, density).digest() == digest
    assert copy.deepcopy(rule) == rule


@every_rule
def test_groups_are_one_where_heads_agree_and_else_one_a_head(spec):
    rule = patterns.build(spec)
    assert make(rule, GEOMETRIES["square"], num_heads=5).num_groups == (5 if rule.varies_by_head else 1)


@every_rule
@both_causalities
@pytest.mark.parametrize("density", [None, 0.2])
def test_everything_is_made_on_the_device_that_is_asked_for(spec, causal, density):
    with torch.device("meta"):  # a tensor made elsewhere than asked would be without contents
        made = make(spec, GEOMETRIES["ragged"], causal, density, device="cpu")
    assert made.digest() == make(spec, GEOMETRIES["ragged"], causal, density).digest()


@pytest.mark.gpu
@every_rule
@both_causalities
@pytest.mark.parametrize("density", [None, 0.2])
def test_a_layout_is_the_same_on_a_gpu(spec, causal, density):
    made = make(spec, GEOMETRIES["ragged"], causal, density, device="cuda")
    assert made.device.type == "cuda"
    assert made.digest() == make(spec, GEOMETRIES["ragged"], causal, density).digest()


@every_rule
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
        ({"density": 1.5}, "density must lie in"),
        ({"density": True}, "density must lie in"),
        ({"num_heads": 0}, "num_heads must be an integer >= 1, got 0"),
        ({"q_block_size": 48}, "q_block_size must be a positive power of two, got 48"),
        ({"kv_block_size": 0}, "kv_block_size must be a positive power of two, got 0"),
        ({"kv_len": 0}, "kv_len must be a positive integer, got 0"),
    ],
)
def test_a_layout_that_cannot_be_says_what_was_wanted(spec, wrong, message):
    with pytest.raises(ValueError, match=message):
        patterns.build(spec).layout(**{"q_len": 256, **wrong})


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("sliding_window", {"window": 0}, "window must be an integer >= 1, got 0"),
        ("sliding_window", {"window": 2.5}, "window must be an integer >= 1, got 2.5"),
        ("sink_window", {"sink": -1}, "sink must be an integer >= 1, got -1"),
        ("dilated", {"segment_lengths": [64, 128], "dilation_rates": [1]}, "must pair up, got 2 lengths and 1 rates"),
        ("dilated", {"segment_lengths": [], "dilation_rates": []}, "segment_lengths must be a non-empty list"),
        ("dilated", {"segment_lengths": [64], "dilation_rates": [0]}, r"dilation_rates\[0\] must be an integer >= 1"),
        ("global_blocks", {"num_globals": 0}, "num_globals must be an integer >= 1, got 0"),
        ("strided", {"stride": "4"}, "stride must be an integer >= 1, got '4'"),
        ("fixed", {"span": 4, "summary": 5}, "summary must be at most span = 4 blocks, got 5"),
        ("random", {"seed": -1}, "seed must be an integer >= 0, got -1"),
        ("random", {"num_random": True}, "num_random must be an integer >= 0, got True"),
        ("bigbird", {"window": None}, "window must be an integer >= 1, got None"),
        ("chunked", {"chunk": 64, "shift": 64}, "shift must be less than chunk = 64 tokens, got 64"),
        ("vertical_slash", {"columns": 3}, "columns must be a non-empty list of integers, got 3"),
        ("vertical_slash", {"offsets": [-5]}, r"offsets\[0\] must be an integer >= 0, got -5"),
        ("document", {"lengths": "abc"}, "lengths must be a non-empty list of integers, got 'abc'"),
    ],
)
def test_a_bad_parameter_says_what_was_wanted(name, params, message):
    with pytest.raises(ValueError, match=message):
        patterns.build({"name": name, "params": params})
