"""BlockSparseBase against torch's attention with the pattern as a dense mask."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from raybsa.layout import BlockLayout
from raybsa.patterns import SinkWindow, SlidingWindow, per_head
from raybsa.variants.base import BlockSparseBase
from raybsa.variants.selection import Selection

PATTERN = per_head([SlidingWindow(window=24), SinkWindow(sink=8, window=8)])


def qkv(batch=2, heads=4, kv_heads=4, q_len=60, kv_len=60, dim=8, dtype=torch.float64):
    shapes = ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))
    return [torch.randn(batch, h, s, dim, dtype=dtype, requires_grad=True) for h, s in shapes]


def dense(q, k, v, forbidden, scale=None):
    """torch's attention over the pairs that are not forbidden (every query here sees a key)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~forbidden, scale=scale)


def assert_same(out, wanted, inputs):
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_output_and_gradients_are_those_of_dense_attention_under_the_patterns_mask(causal, kv_heads, forbidden):
    module = BlockSparseBase(pattern=PATTERN, block_size=8, causal=causal)
    q, k, v = qkv(kv_heads=kv_heads)
    assert_same(module(q, k, v), dense(q, k, v, forbidden(PATTERN, 60, heads=4, causal=causal)), (q, k, v))


def test_queries_and_keys_may_differ_in_length(forbidden):
    module = BlockSparseBase(pattern=PATTERN, block_size=8)
    q, k, v = qkv(q_len=52, kv_len=30)
    assert_same(module(q, k, v), dense(q, k, v, forbidden(PATTERN, 52, 30, heads=4)), (q, k, v))


def test_the_lists_make_the_dilated_pattern(forbidden):
    module = BlockSparseBase([32, 64], [1, 2], block_size=8)
    q, k, v = qkv(q_len=64, kv_len=64)
    spec = {"name": "dilated", "params": {"segment_lengths": [32, 64], "dilation_rates": [1, 2]}}
    mask = forbidden(spec, 64)
    assert not mask[0, 0, 8]
    assert mask[0, 0, 40]
    assert_same(module(q, k, v), dense(q, k, v, mask), (q, k, v))


def test_density_and_scale_reach_the_attention(forbidden):
    module = BlockSparseBase(pattern="sliding_window", density=0.25, block_size=8, scale=0.1)
    q, k, v = qkv(q_len=64, kv_len=64)
    assert_same(module(q, k, v), dense(q, k, v, forbidden("sliding_window", 64, density=0.25), scale=0.1), (q, k, v))


def test_masks_and_segments_narrow_what_the_pattern_keeps(forbidden):
    module = BlockSparseBase(pattern=PATTERN, block_size=8, causal=True)
    q, k, v = qkv()
    hidden = forbidden(PATTERN, 60, heads=4, causal=True)
    segments = (torch.arange(60) // 25).expand(2, 60)
    apart = segments[0][:, None] != segments[0]
    assert_same(module(q, k, v, segment_ids=(segments, segments)), dense(q, k, v, hidden | apart), (q, k, v))
    mask = (torch.rand(60, 60) < 0.7) | torch.eye(60, dtype=torch.bool)
    assert_same(module(q, k, v, attn_mask=mask), dense(q, k, v, hidden | ~mask), (q, k, v))


def test_a_source_may_bring_a_bias_a_block():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.3, -1.0], dtype=torch.float64))

        def select(self, q, k, attn_mask=None, segment_ids=None):
            return Selection(BlockLayout.from_rows([[0, 1]], q_len=8, kv_len=16, q_block_size=8), self.weight)

        def complete(self, selection, call, out):
            return out

    module = BlockSparseBase(pattern="dense")
    module.source = Learned()
    q, k, v = qkv(q_len=8, kv_len=16)
    bias = module.source.weight.repeat_interleave(8)
    assert_same(
        module(q, k, v),
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(8, 16)),
        (q, k, v, module.source.weight),
    )
    assert list(module.state_dict()) == ["source.weight"]


def test_dropout_acts_in_training_alone_and_follows_torchs_seed():
    module = BlockSparseBase(pattern=PATTERN, block_size=8, dropout=0.5)
    q, k, v = qkv()
    torch.manual_seed(1)
    first = module(q, k, v)
    torch.manual_seed(1)
    assert torch.equal(module(q, k, v), first)
    assert not torch.equal(module(q, k, v), first)
    calm = module.eval()(q, k, v)
    assert torch.equal(calm, BlockSparseBase(pattern=PATTERN, block_size=8)(q, k, v))


def test_dropout_keeps_the_mean():
    module = BlockSparseBase(pattern="dense", block_size=8, dropout=0.3)
    q, k, _ = qkv(batch=8, heads=8, kv_heads=8)
    ones = torch.ones_like(k)
    assert float(module(q, k, ones).detach().mean()) == pytest.approx(1.0, abs=0.01)


def test_a_training_step_after_one_under_inference_mode_works(forbidden):
    module = BlockSparseBase(pattern=PATTERN, block_size=8, causal=True)
    q, k, v = qkv()
    with torch.inference_mode():
        module(q, k, v)
    assert_same(module(q, k, v), dense(q, k, v, forbidden(PATTERN, 60, heads=4, causal=True)), (q, k, v))


def test_autocast_computes_in_bfloat16_close_to_float32():
    module = BlockSparseBase(pattern=PATTERN, block_size=8)
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(q, k, v), rtol=0.0, atol=0.03)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_again(reentrant):
    module = BlockSparseBase(pattern=PATTERN, block_size=8, dropout=0.4)
    inputs = qkv()
    torch.manual_seed(3)
    plain = module(*inputs)
    torch.manual_seed(3)
    again = checkpoint(module, *inputs, use_reentrant=reentrant)
    assert torch.equal(plain, again)
    for ours, theirs in zip(
        torch.autograd.grad(plain.square().sum(), inputs), _grads(again.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _grads(loss, inputs):
    """By backward, since reentrant checkpoints refuse torch.autograd.grad."""
    loss.backward()
    return [x.grad for x in inputs]


def test_its_text_says_what_it_does():
    module = BlockSparseBase(pattern=SinkWindow(sink=16), density=0.5, block_size=8, dropout=0.1, backend="blocked")
    text = "density=0.5, block_size=8, causal=False, dropout=0.1, backend='blocked'"
    assert repr(module) == f"BlockSparseBase(pattern=SinkWindow(sink=16, window=512), {text})"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dropout": 1.0}, ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"density": -0.1}, ValueError, r"density must lie in \(0, 1\], got -0.1"),
        ({"block_size": 0}, ValueError, "power of two, got 0"),
        ({"segment_lengths": [8]}, ValueError, "go together, got only segment_lengths"),
        ({"dilation_rates": [1]}, ValueError, "go together, got only dilation_rates"),
        ({"segment_lengths": [8, 16], "dilation_rates": [1]}, ValueError, "got 2 lengths and 1 rates"),
        ({"segment_lengths": [8], "dilation_rates": [1], "pattern": "dense"}, ValueError, "got both"),
        ({"segment_lengths": 8, "dilation_rates": 1}, ValueError, "non-empty list of integers, got 8"),
        ({"pattern": "nope"}, ValueError, "unknown pattern 'nope'"),
    ],
)
def test_bad_arguments_say_what_was_wanted_and_what_came(arguments, error, message):
    with pytest.raises(error, match=message):
        BlockSparseBase(**arguments)


def test_bad_tensors_say_what_was_wanted_and_what_came():
    module = BlockSparseBase(pattern="dense", block_size=8)
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"k must be a tensor \(batch, heads, tokens, head_dim\), got \(4, 60, 8\)"):
        module(q, k[0], v)
    with pytest.raises(ValueError, match="multiple of the KV heads"):
        module(q[:, :3], k[:, :2], v[:, :2])
    with pytest.raises(ValueError, match=r"got .*float64"):
        module(q.float(), k, v)
    with pytest.raises(ValueError, match="unknown backend"):
        BlockSparseBase(pattern="dense", block_size=8, backend="magic")(q, k, v)
