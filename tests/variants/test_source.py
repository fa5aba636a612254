"""FixedPattern and its cache."""

import copy
import pickle
import threading

import pytest
import torch

from raybsa.cache import LayoutCache
from raybsa.layout import BlockLayout
from raybsa.patterns import Pattern, Random, SlidingWindow
from raybsa.patterns.pattern import Pattern as PatternBase
from raybsa.spec import PatternSpec
from raybsa.variants.source import FixedPattern, fixed_pattern


@pytest.fixture
def built(monkeypatch) -> list[tuple]:
    """The (q_len, kv_len, num_heads, device) of every layout that any rule makes from here on."""
    calls: list[tuple] = []
    layout = PatternBase.layout

    def counted(self, q_len, kv_len=None, **options):
        calls.append((q_len, kv_len, options["num_heads"], str(options["device"])))
        return layout(self, q_len, kv_len, **options)

    monkeypatch.setattr(PatternBase, "layout", counted)
    return calls


def qk(q_len: int, kv_len: int | None = None, heads: int = 2, device: str = "cpu", batch: int = 1):
    return torch.empty(batch, heads, q_len, 4, device=device), torch.empty(batch, 1, kv_len or q_len, 4, device=device)


class OwnPattern(Pattern):
    """A user's own family: every row keeps its diagonal and nothing else."""

    def blocks(self, grid):
        return grid.diagonal


def test_a_second_call_of_any_batch_size_builds_nothing_and_returns_the_same_layout(built):
    source = FixedPattern("random", density=0.5, block_size=8)
    first, bias, *_ = source.select(*qk(64))
    assert bias is None
    assert source.select(*qk(64, batch=3))[0] is first
    assert built == [(64, 64, 2, "cpu")]


def test_other_lengths_or_heads_get_a_layout_of_their_own(built):
    source = FixedPattern(Random(), density=0.5, block_size=8)
    layouts = [source.select(*qk(64))[0], source.select(*qk(64, 32))[0], source.select(*qk(64, 64, 4))[0]]
    assert [(x.q_len, x.kv_len, x.num_groups) for x in layouts] == [(64, 64, 2), (64, 32, 2), (64, 64, 4)]
    assert built == [(64, 64, 2, "cpu"), (64, 32, 2, "cpu"), (64, 64, 4, "cpu")]


def test_another_device_gets_a_layout_of_its_own(monkeypatch):
    devices = []

    def layout(self, q_len, kv_len=None, **options):
        devices.append(options["device"].type)
        return BlockLayout.from_rows([[0]], q_len=8, kv_len=8, q_block_size=8)

    monkeypatch.setattr(PatternBase, "layout", layout)
    source = FixedPattern("dense", block_size=8)
    for device in ("cpu", "meta", "cpu", "meta"):
        source.layout(8, 8, 2, torch.device(device))
    assert devices == ["cpu", "meta"]


def test_the_layout_is_the_rules_own():
    source = FixedPattern({"name": "sliding_window", "params": {"window": 16}}, block_size=8, causal=True)
    assert source.rule == SlidingWindow(window=16)
    layout = source.select(*qk(64))[0]
    assert layout.digest() == SlidingWindow(window=16).layout(64, q_block_size=8, causal=True).digest()


def test_a_pattern_may_be_a_rule_a_spec_a_dict_a_name_or_a_class_of_ones_own():
    spec = SlidingWindow(window=16).spec
    digests = {
        FixedPattern(form, block_size=8).select(*qk(64))[0].digest()
        for form in (SlidingWindow(window=16), spec, spec.to_dict())
    }
    assert len(digests) == 1
    assert FixedPattern("dense", block_size=8).select(*qk(64))[0].density == 1.0
    own = FixedPattern(OwnPattern(), block_size=8).select(*qk(64))[0]
    assert own.to_dense()[0].tolist() == torch.eye(8, dtype=torch.bool).tolist()


def test_a_class_of_ones_own_is_found_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "my_patterns.py").write_text(
        "from dataclasses import dataclass\n"
        "from raybsa.patterns import Pattern\n"
        "@dataclass(frozen=True)\n"
        "class Diagonal(Pattern):\n"
        "    def blocks(self, grid):\n"
        "        return grid.diagonal\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    layout = FixedPattern(PatternSpec("my_patterns:Diagonal"), block_size=8).select(*qk(64))[0]
    assert layout.nnz_blocks == 8


def test_the_cache_forgets_what_was_used_longest_ago(built):
    source = FixedPattern("dense", block_size=8, cache_size=2)
    for length in (8, 16, 8, 24, 8, 16):
        source.select(*qk(length))
    assert [call[0] for call in built] == [8, 16, 24, 16]
    assert len(source.written._cache) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_starts_with_an_empty_cache_and_gives_the_same_layouts(copied, built):
    source = FixedPattern("bigbird", density=0.3, block_size=8, causal=True)
    layout = source.select(*qk(128))[0]
    other = copied(source)
    assert len(other.written._cache) == 0
    assert len(source.written._cache) == 1
    again = other.select(*qk(128))[0]
    assert again is not layout
    assert again.digest() == layout.digest()
    assert len(built) == 2


def test_threads_that_ask_at_once_get_one_layout_built_once(built):
    source, count = FixedPattern("dense", block_size=8), 8
    start, found = threading.Barrier(count), []

    def ask() -> None:
        start.wait(timeout=10)
        found.append(source.select(*qk(256))[0])

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len({id(layout) for layout in found}) == 1
    assert len(found) == count
    assert len(built) == 1


def test_a_build_that_fails_is_not_remembered():
    cache, layout = LayoutCache(), BlockLayout.from_rows([[0]], q_len=8, kv_len=8, q_block_size=8)

    def broken() -> BlockLayout:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.get("key", broken)
    assert cache.get("key", lambda: layout) is layout


def test_a_layout_made_under_inference_mode_can_be_trained_with():
    source = FixedPattern("dense", block_size=8)
    with torch.inference_mode():
        layout = source.select(*qk(16))[0]
    assert not layout.col_indices.is_inference()


def test_segment_lengths_and_dilation_rates_name_the_dilated_pattern_at_its_natural_density():
    source = fixed_pattern(None, (32,), (2,), density=None, block_size=8, causal=False)
    assert source.rule.spec == PatternSpec("dilated", {"segment_lengths": [32], "dilation_rates": [2]})
    assert source.density is None


def test_without_a_pattern_it_is_a_sliding_window_at_a_tenth():
    source = fixed_pattern(None, None, None, density=None, block_size=8, causal=False)
    assert source.rule.spec.name == "sliding_window"
    assert source.select(*qk(640))[0].density == pytest.approx(0.1)
    halved = fixed_pattern(None, None, None, density=0.05, block_size=8, causal=False)
    assert halved.select(*qk(640))[0].density == pytest.approx(0.05)


def test_its_text_names_pattern_density_block_size_and_causality():
    source = FixedPattern(SlidingWindow(), density=0.25, block_size=8, causal=True)
    assert repr(source) == "pattern=SlidingWindow(window=512), density=0.25, block_size=8, causal=True"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"density": 0.0}, ValueError, r"density must lie in \(0, 1\], got 0"),
        ({"density": 1.5}, ValueError, r"density must lie in \(0, 1\], got 1.5"),
        ({"block_size": 48}, ValueError, "power of two, got 48"),
        ({"pattern": "spiral"}, ValueError, "unknown pattern 'spiral'"),
        ({"pattern": {"name": "dilated", "params": {"width": 3}}}, ValueError, "no parameter width"),
        ({"pattern": 7}, TypeError, "got 7"),
        ({"cache_size": 0}, ValueError, "maxsize must be positive, got 0"),
    ],
)
def test_bad_arguments_say_what_was_wanted_and_what_came(arguments, error, message):
    with pytest.raises(error, match=message):
        FixedPattern(**{"pattern": "dense", **arguments})
