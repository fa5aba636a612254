"""BlockSparseMultihead with real patterns, against nn.MultiheadAttention under the pattern as a mask."""

import re

import pytest
import torch
from torch import nn

from raybsa.layout import BlockLayout
from raybsa.patterns import Random, SinkWindow, SlidingWindow, per_head
from raybsa.variants.multihead import BlockSparseMultihead
from raybsa.variants.selection import Selection

PATTERN = per_head([SlidingWindow(window=24), SinkWindow(sink=8, window=8)])
EMBED, HEADS, BATCH = 16, 4, 2


def pair(**options):
    torchs = {name: options.pop(name) for name in ("add_bias_kv", "add_zero_attn") if name in options}
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **torchs)
    ours = BlockSparseMultihead(
        EMBED, HEADS, batch_first=True, dtype=torch.float64, block_size=8, **torchs, **{"pattern": PATTERN, **options}
    )
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(q_len=44, kv_len=None):
    query = torch.randn(BATCH, q_len, EMBED, dtype=torch.float64)
    return [query] * 3 if kv_len is None else [query, *torch.randn(2, BATCH, kv_len, EMBED, dtype=torch.float64)]


def assert_same(got, wanted):
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("extras", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "extras"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_len", [None, 30])
def test_it_attends_what_the_pattern_keeps_and_no_more(kv_len, causal, extras, forbidden):
    theirs, ours = pair(causal=causal, **extras)
    tensors = inputs(44, kv_len)
    hidden = forbidden(PATTERN, 44, kv_len, heads=HEADS, causal=causal).repeat(BATCH, 1, 1)
    assert_same(ours(*tensors), theirs(*tensors, attn_mask=hidden))


def test_queries_whose_blocks_are_all_padding_see_the_extra_keys_alone(forbidden):
    theirs, ours = pair(add_bias_kv=True, add_zero_attn=True)
    tensors = inputs()
    padding = torch.arange(44) >= torch.tensor([44, 11])[:, None]
    hidden = forbidden(PATTERN, 44, heads=HEADS).repeat(BATCH, 1, 1) | padding.repeat_interleave(HEADS, 0)[:, None]
    assert hidden.all(-1).any()
    got = ours(*tensors, key_padding_mask=padding, average_attn_weights=False)
    assert_same(got, theirs(*tensors, attn_mask=hidden, average_attn_weights=False))


def test_a_hand_written_window_of_neighbouring_blocks():
    theirs, ours = pair(pattern=SlidingWindow(window=9))
    block = torch.arange(32) // 8
    hidden = (block[:, None] - block).abs() > 1
    tensors = inputs(32)
    assert_same(ours(*tensors), theirs(*tensors, attn_mask=hidden))


def test_masks_of_your_own_narrow_the_pattern(forbidden):
    theirs, ours = pair()
    tensors = inputs()
    hidden = forbidden(PATTERN, 44, heads=HEADS).repeat(BATCH, 1, 1)
    own = (torch.rand(44, 44) < 0.3) & ~torch.eye(44, dtype=torch.bool)
    bias = torch.randn(BATCH * HEADS, 44, 44, dtype=torch.float64)
    assert_same(ours(*tensors, attn_mask=own), theirs(*tensors, attn_mask=hidden | own))
    assert_same(ours(*tensors, attn_mask=bias), theirs(*tensors, attn_mask=bias.masked_fill(hidden, float("-inf"))))


@pytest.mark.parametrize("extras", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "extras"])
def test_in_training_the_weights_are_those_that_made_the_output_dropout_included(extras):
    _, ours = pair(**extras)
    ours.dropout = 0.4
    with torch.no_grad():
        ours.out_proj.weight.copy_(torch.eye(EMBED))
    x = inputs()[0]
    out, weights = ours(x, x, x, average_attn_weights=False)
    values = (x @ ours.in_proj_weight[2 * EMBED :].T + ours.in_proj_bias[2 * EMBED :]).view(BATCH, 44, HEADS, -1)
    values = values.transpose(1, 2)
    if extras:
        bias = ours.bias_v.view(1, HEADS, 1, -1).expand(BATCH, -1, -1, -1)
        values = torch.cat([values, bias, torch.zeros_like(bias)], 2)
    torch.testing.assert_close((weights @ values).transpose(1, 2).flatten(2), out)
    kept = weights[..., 44:] if extras else weights[:, 0].diagonal(dim1=1, dim2=2)
    assert 0.3 < (kept == 0).float().mean() < 0.5


def test_the_weights_follow_a_block_bias_of_the_source():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))

        def select(self, q, k, attn_mask=None, segment_ids=None):
            return Selection(BlockLayout.from_rows([[0, 1]], q_len=8, kv_len=16, q_block_size=8), self.weight)

        def complete(self, selection, call, out):
            return out

    theirs, ours = pair()
    ours.source = Learned()
    tensors = inputs(8, 16)
    bias = ours.source.weight.repeat_interleave(8).expand(8, 16)
    assert_same(ours(*tensors), theirs(*tensors, attn_mask=bias))
    assert "source.weight" in ours.state_dict()


def test_without_weights_nothing_of_size_q_times_kv_is_made():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    length, batch = 2048, 2
    module = BlockSparseMultihead(8, 2, batch_first=True, pattern=SlidingWindow(window=16), block_size=16)
    x = torch.randn(batch, length, 8)
    padding = torch.arange(length) >= torch.tensor([length, 1500])[:, None]
    for mask in (padding, torch.zeros(batch, length).masked_fill(padding, float("-inf"))):
        with Watch():
            module(x, x, x, key_padding_mask=mask, need_weights=False)
    assert 0 < largest < length * length


def test_no_future_token_changes_an_earlier_output_of_a_causal_module():
    _, ours = pair(causal=True, pattern=Random(seed=3), density=0.5)
    x = inputs()[0]
    changed = x.clone()
    changed[:, 30:] += 1.0
    before, after = ours(x, x, x)[0], ours(changed, changed, changed)[0]
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_gives_nested_output_like_padded_input_and_says_which_length_it_took():
    _, ours = pair(pattern=SlidingWindow(window=9))
    x = inputs()[0]
    lengths = [44, 27]
    padding = torch.arange(44) >= torch.tensor(lengths)[:, None]
    wanted, wanted_weights = ours(x, x, x, key_padding_mask=padding)
    nested = torch.nested.as_nested_tensor([row[:n] for row, n in zip(x, lengths, strict=True)])
    with pytest.warns(UserWarning, match="made for the longest sequence, 44 tokens"):
        out, weights = ours(nested, nested, nested)
    assert out.is_nested
    for row, want, length in zip(out.unbind(), wanted, lengths, strict=True):
        torch.testing.assert_close(row, want[:length])
    torch.testing.assert_close(weights[~padding], wanted_weights[~padding])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_that_torch_would_not_take_is_refused():
    _, ours = pair()
    nested, other = (torch.nested.as_nested_tensor([torch.randn(n, EMBED).double() for n in (5, 3)]) for _ in range(2))
    with pytest.raises(ValueError, match=r"query, key and value one tensor.*one tensor: False"):
        ours(nested, other, other)
    with pytest.raises(ValueError, match="takes no key_padding_mask"):
        ours(nested, nested, nested, key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "embed_dim must be a positive multiple of num_heads, got 16 and 3"),
        ({"num_heads": 0}, ValueError, "got 16 and 0"),
        ({"dropout": 1.5}, ValueError, r"dropout must lie in \[0, 1\), got 1.5"),
        ({"density": 2.0}, ValueError, r"density must lie in \(0, 1\], got 2.0"),
        ({"block_size": 12}, ValueError, "power of two, got 12"),
        ({"segment_lengths": [8]}, ValueError, "go together"),
    ],
)
def test_bad_arguments_say_what_was_wanted_and_what_came(arguments, error, message):
    with pytest.raises(error, match=message):
        BlockSparseMultihead(**{"embed_dim": EMBED, "num_heads": HEADS, **arguments})


X = torch.zeros(2, 10, EMBED)


@pytest.mark.parametrize(
    ("tensors", "arguments", "error", "message"),
    [
        ((X, X[0], X[0]), {}, ValueError, "all unbatched (2-D) or all batched (3-D), got (2, 10, 16), (10, 16)"),
        ((X[..., :8], X, X), {}, ValueError, "query must have 16 features in its last dimension, got (2, 10, 8)"),
        ((X, X, X[:, :9]), {}, ValueError, "key and value must agree in length and batch"),
        ((X, X[:1], X[:1]), {}, ValueError, "query and key must agree in their batch, dimension 0"),
        ((X, X, X), {"attn_mask": torch.zeros(10, 9)}, ValueError, "must be (10, 10) or (8, 10, 10), got (10, 9)"),
        ((X, X, X), {"attn_mask": torch.zeros(10, 10).int()}, TypeError, "attn_mask must be bool or floating point"),
        ((X, X, X), {"key_padding_mask": torch.zeros(10)}, ValueError, "key_padding_mask must be (2, 10), got (10,)"),
        ((X, X, X), {"key_padding_mask": torch.zeros(2, 10).int()}, TypeError, "got torch.int32"),
        ((X, X, X), {"is_causal": True}, ValueError, "is_causal is a hint about attn_mask and needs it"),
    ],
)  # fmt: skip
def test_bad_inputs_say_what_was_wanted_and_what_came(tensors, arguments, error, message):
    module = BlockSparseMultihead(EMBED, HEADS, batch_first=True, pattern="dense", block_size=8)
    with pytest.raises(error, match=re.escape(message)):
        module(*tensors, **arguments)
