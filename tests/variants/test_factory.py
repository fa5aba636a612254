"""The factories, and the four blocks of the origin's "Recommendations by Use Case" as they were written."""

import inspect

import pytest
import torch
import torch.nn as nn

import raybsa
from raybsa import (
    BlockSparseAdaptive,
    BlockSparseBase,
    BlockSparseDistributed,
    BlockSparseMultihead,
    DistributedConfig,
    PatternSpec,
    create_block_sparse_attention,
    create_multihead_block_sparse,
)
from raybsa.patterns import Dilated, SlidingWindow
from raybsa.spec import AttentionSpec

GENERAL = """\
model = create_block_sparse_attention(
    variant="base",
    segment_lengths=[2048],
    dilation_rates=[1],
    sparsity_ratio=0.01  # 99% sparse
)
"""
COMPATIBILITY = """\
model = create_multihead_block_sparse(
    embed_dim=768,
    num_heads=12,
    sparsity_ratio=0.05  # 95% sparse
)
"""
RESEARCH = """\
model = BlockSparseAdaptive(
    segment_lengths=[2048],
    dilation_rates=[1],
    num_heads=8,
    head_dim=64
)
"""
MULTI_GPU = """\
# DataParallel (simple)
model = nn.DataParallel(base_model)

# Or Distributed (advanced)
model = create_block_sparse_attention(
    variant="distributed",
    distributed_config=config
)
"""


def run(block: str, **names) -> dict:
    scope = {"nn": nn, **{name: getattr(raybsa, name) for name in raybsa.__all__}, **names}
    exec(block, scope)
    return scope


def layout_of(module, length: int, heads: int = 1):
    q = torch.empty(1, heads, length, 1)
    return module.source.select(q, q)[0]


def test_the_general_purpose_block_runs_and_keeps_one_percent_of_a_long_sequence():
    model = run(GENERAL)["model"]
    assert isinstance(model, BlockSparseBase)
    assert model.source.rule.spec == PatternSpec("dilated", {"segment_lengths": [2048], "dilation_rates": [1]})
    assert layout_of(model, 25_600).density == pytest.approx(0.01)
    q = torch.randn(1, 2, 512, 16)
    assert model(q, q, q).shape == q.shape


def test_the_compatibility_block_runs_and_takes_the_place_of_torchs_module():
    model = run(COMPATIBILITY)["model"]
    assert isinstance(model, BlockSparseMultihead)
    assert layout_of(model, 6400, 12).density == pytest.approx(0.05)
    model.load_state_dict(nn.MultiheadAttention(768, 12).state_dict())
    x = torch.randn(70, 1, 768)
    assert model(x, x, x, need_weights=False)[0].shape == x.shape


def test_the_multi_gpu_block_makes_data_parallel_and_a_ring_that_is_alone_until_bound():
    base_model = create_block_sparse_attention(pattern="dense")
    q = torch.randn(1, 2, 64, 16)
    for config in (None, DistributedConfig(partition="zigzag")):
        scope = {"base_model": base_model, "config": config}
        model = run(MULTI_GPU, **scope)["model"]
        assert isinstance(model, BlockSparseDistributed)
        assert torch.allclose(model(q, q, q), create_block_sparse_attention()(q, q, q))
        parallel = run(MULTI_GPU.partition("# Or")[0], **scope)["model"]
        assert torch.equal(parallel(q, q, q), base_model(q, q, q))


def test_the_research_block_makes_attention_that_learns_its_pattern():
    model = run(RESEARCH)["model"]
    assert isinstance(model, BlockSparseAdaptive)
    q = torch.randn(1, 8, 256, 64)
    assert model(q, q, q).shape == q.shape
    assert model.selector_loss().item() > 0


def test_the_learned_variant_is_made_by_its_name_or_its_pattern():
    spec = {"name": "adaptive", "params": {"method": "bias", "sinks": 2}}
    for variant in ("adaptive", "auto"):
        model = create_block_sparse_attention(
            variant, pattern=spec, num_heads=4, head_dim=16, num_kv_heads=2, density=0.5, block_size=8, causal=True
        )
        assert isinstance(model, BlockSparseAdaptive)
        assert (model.source.method, model.source.rules.sinks, model.source.density.end) == ("bias", 2, 0.5)
        assert (model.source.num_heads, model.source.num_kv_heads, model.source.head_dim) == (4, 2, 16)
    assert create_block_sparse_attention("adaptive", num_heads=2, head_dim=4).source.density.end == 0.1
    heads = create_multihead_block_sparse(16, 2, pattern=spec, density=0.5, dtype=torch.float64)
    assert heads.source.gate.key.dtype == torch.float64
    with pytest.raises(ValueError, match="needs num_heads and head_dim, for its parameters: got None and None"):
        create_block_sparse_attention("adaptive")
    with pytest.raises(ValueError, match="takes no other pattern, got 'bigbird'"):
        create_block_sparse_attention("adaptive", pattern="bigbird", num_heads=2, head_dim=4)


def test_auto_is_base():
    assert type(create_block_sparse_attention()) is BlockSparseBase
    assert repr(create_block_sparse_attention()) == repr(create_block_sparse_attention("base"))


@pytest.mark.parametrize("word", ["density", "sparsity_ratio"])
@pytest.mark.parametrize("make", [create_block_sparse_attention, lambda **k: create_multihead_block_sparse(8, 2, **k)])
def test_density_and_sparsity_ratio_are_two_words_for_the_share_that_is_kept(make, word):
    assert layout_of(make(**{word: 0.25}), 6400, 2).density == pytest.approx(0.25)
    assert layout_of(make(), 6400, 2).density == pytest.approx(0.1)
    natural = layout_of(make(pattern=SlidingWindow(window=64)), 6400, 2)
    assert natural.digest() == SlidingWindow(window=64).layout(6400).digest()


def test_an_attention_spec_is_the_factorys_arguments():
    spec = AttentionSpec("base", Dilated((16, 64), (1, 2)).spec, density=0.5, block_size=8, backend="reference")
    module = create_block_sparse_attention(**spec.to_dict(), causal=True)
    wanted = BlockSparseBase(
        pattern=Dilated((16, 64), (1, 2)), density=0.5, block_size=8, backend="reference", causal=True
    )
    assert repr(module) == repr(wanted)
    q = torch.randn(1, 2, 40, 8)
    assert torch.equal(module(q, q, q), wanted(q, q, q))


def test_every_argument_of_the_multihead_factory_arrives():
    torch.manual_seed(1)
    made = create_multihead_block_sparse(
        16, 2, density=0.5, block_size=8, segment_lengths=[32], dilation_rates=[2], causal=True, backend="blocked",
        dropout=0.25, bias=False, add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=7, batch_first=True,
        device="cpu", dtype=torch.float64,
    )  # fmt: skip
    torch.manual_seed(1)
    wanted = nn.MultiheadAttention(16, 2, 0.25, False, True, True, 6, 7, True, "cpu", torch.float64)
    for name, value in wanted.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)
    for name in ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first"):
        assert getattr(made, name) == getattr(wanted, name)
    assert repr(made.source) == (
        "pattern=Dilated(segment_lengths=(32,), dilation_rates=(2,)), density=0.5, block_size=8, causal=True"
    )
    assert made.backend == "blocked"
    assert create_multihead_block_sparse(16, 2, pattern="dense").source.rule.spec.name == "dense"


def test_every_argument_of_the_base_factory_arrives():
    module = create_block_sparse_attention(
        pattern="dense", density=0.5, block_size=8, causal=True, dropout=0.25, scale=0.5, backend="blocked"
    )
    wanted = "pattern=Dense(), density=0.5, block_size=8, causal=True, dropout=0.25, scale=0.5, backend='blocked'"
    assert module.extra_repr() == wanted


def test_a_config_from_a_file_is_a_config():
    data = {"partition": "zigzag", "gradient_codec": {"name": "int8", "params": {"block_size": 64}}}
    module = create_block_sparse_attention("distributed", pattern="random", distributed_config=data)
    assert module.config == raybsa.DistributedConfig(**data)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        create_block_sparse_attention("distributed", distributed_config={"colour": "red"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "spiral"}, r"variant must be one of \['auto', 'base', 'adaptive', 'distributed'\], got 'spiral'"),
        ({"density": 0.1, "sparsity_ratio": 0.2}, r"give one: got density=0.1 and sparsity_ratio=0.2"),
        ({"sparsity_ratio": 0}, r"density must lie in \(0, 1\], got 0"),
        ({"distributed_config": object()}, r"goes with variant 'distributed', got it with 'auto'"),
    ],
)
def test_bad_arguments_say_what_was_wanted_and_what_came(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_block_sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("factory", "variant", "own"),
    [
        (
            create_block_sparse_attention,
            BlockSparseBase,
            {"variant", "sparsity_ratio", "distributed_config", "num_heads", "head_dim", "num_kv_heads"},
        ),
        (create_multihead_block_sparse, BlockSparseMultihead, {"sparsity_ratio"}),
    ],
)
def test_a_factory_offers_what_its_variant_takes_with_the_same_defaults(factory, variant, own):
    offered, taken = (
        {name: parameter.default for name, parameter in inspect.signature(make).parameters.items()}
        for make in (factory, variant)
    )
    assert {name: default for name, default in offered.items() if name not in own} == taken
