"""BlockSparseMultihead inside torch's transformer layers, against the same layers under the pattern as a mask."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from raybsa.patterns import Random
from raybsa.variants.multihead import BlockSparseMultihead

EMBED, HEADS, LENGTH = 16, 4, 48
PATTERN, DENSITY = Random(seed=2), 0.4
LENGTHS = torch.tensor([48, 30])
PADDING = torch.arange(LENGTH) >= LENGTHS[:, None]


def sparse(batch_first=True, **options) -> BlockSparseMultihead:
    return BlockSparseMultihead(
        EMBED, HEADS, batch_first=batch_first, pattern=PATTERN, density=DENSITY, block_size=8, **options
    )


def encoder_layer(batch_first=True, **options) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(EMBED, HEADS, 32, dropout=0.0, batch_first=batch_first, **options)


def with_sparse_attention(layer, batch_first=True, **options):
    """The layer with its self-attention replaced, weights kept."""
    ours = sparse(batch_first, **options)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    return layer


def twins(batch_first=True, **options):
    """Torch's layer, and one with the same weights and our attention."""
    theirs, ours = encoder_layer(batch_first, **options), encoder_layer(batch_first, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, with_sparse_attention(ours, batch_first)


@pytest.fixture
def hidden(forbidden):
    """(2 * HEADS, LENGTH, LENGTH) bool: the pattern as torch's mask."""
    return forbidden(PATTERN, LENGTH, heads=HEADS, density=DENSITY).repeat(2, 1, 1)


@pytest.fixture
def fused_calls(monkeypatch) -> list[int]:
    """Grows by one each time that a layer takes torch's fused, dense path."""
    calls: list[int] = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fused(*a))
    return calls


MODES = {"train": (True, nullcontext), "eval": (False, nullcontext), "no_grad": (False, torch.no_grad),
         "inference": (False, torch.inference_mode)}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_layer_is_sparse_in_every_mode(norm_first, batch_first, mode, hidden, fused_calls):
    training, context = MODES[mode]
    theirs, ours = (layer.train(training) for layer in twins(batch_first, norm_first=norm_first))
    x = torch.randn(2, LENGTH, EMBED)
    x = x if batch_first else x.transpose(0, 1)
    with context():
        wanted, dense = theirs(x, src_mask=hidden), theirs(x)
        before = len(fused_calls)
        got = ours(x)
    assert len(fused_calls) == before, "the layer took the fused path"
    assert before == (2 if batch_first and mode in ("no_grad", "inference") else 0)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (got - dense).abs().max() > 0.01


@pytest.mark.parametrize("mode", MODES)
def test_padding_and_masks_pass_through_an_encoder_layer(mode, hidden):
    training, context = MODES[mode]
    theirs, ours = (layer.train(training) for layer in twins())
    x = torch.randn(2, LENGTH, EMBED)
    causal = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
    padded = hidden | PADDING.repeat_interleave(HEADS, 0)[:, None]
    seen = ~padded.all(-1).view(2, HEADS, LENGTH).any(1)
    with context():
        got = ours(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(got[seen], theirs(x, src_mask=padded)[seen], rtol=1e-5, atol=1e-5)
        got = ours(x, src_mask=causal, is_causal=True)
        torch.testing.assert_close(got, theirs(x, src_mask=hidden | causal), rtol=1e-5, atol=1e-5)
        assert got.isfinite().all()


def two_layers(theirs, hidden, x):
    """A two-layer encoder of equal layers, each under the pattern; padded outputs are 0 in eval, as torch's are."""
    padded = hidden | PADDING.repeat_interleave(HEADS, 0)[:, None]
    padded &= ~padded.all(-1, keepdim=True)
    return theirs(theirs(x, src_mask=padded), src_mask=padded)


@pytest.mark.parametrize("mode", MODES)
def test_an_encoder_of_sparse_layers_is_sparse_in_every_mode(mode, hidden, fused_calls):
    training, context = MODES[mode]
    theirs, ours = twins()
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        nn.TransformerEncoder(ours, 2)
    encoder = nn.TransformerEncoder(ours, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(2, LENGTH, EMBED)
    with context():
        plain, padded = encoder(x), encoder(x, src_key_padding_mask=PADDING)
    assert not fused_calls
    with torch.no_grad():
        torch.testing.assert_close(plain, theirs(theirs(x, src_mask=hidden), src_mask=hidden), rtol=1e-5, atol=1e-5)
        wanted = two_layers(theirs, hidden, x)
    seen = sees_only_tokens(hidden)
    assert seen.sum() > 40
    torch.testing.assert_close(padded[seen], wanted[seen], rtol=1e-5, atol=1e-5)


def sees_only_tokens(hidden):
    """(2, LENGTH) bool: tokens that, in two layers, never rest on a query with nothing to attend."""
    padded = hidden | PADDING.repeat_interleave(HEADS, 0)[:, None]
    blind = padded.all(-1).view(2, HEADS, LENGTH).any(1)
    reached = (~padded.view(2, HEADS, LENGTH, LENGTH) & blind[:, None, None, :]).any(-1).any(1)
    return ~blind & ~reached & ~PADDING


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:a nested input has no padded length")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_layers_replaced_in_an_encoder_that_makes_nested_tensors_are_sparse_too(context, hidden, fused_calls):
    theirs, ours = twins()
    encoder = nn.TransformerEncoder(encoder_layer(), 2)
    for layer in encoder.layers:
        layer.load_state_dict(theirs.state_dict())
        with_sparse_attention(layer)
    x = torch.randn(2, LENGTH, EMBED)
    encoder.eval()
    with context():
        got = encoder(x, src_key_padding_mask=PADDING)
        unnested = nn.TransformerEncoder(ours, 2, enable_nested_tensor=False).eval()(x, src_key_padding_mask=PADDING)
    assert not fused_calls
    assert not got[PADDING].any(), "the encoder did not make nested tensors"
    torch.testing.assert_close(got[~PADDING], unnested[~PADDING], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        wanted = two_layers(theirs, hidden, x)
    seen = sees_only_tokens(hidden)
    torch.testing.assert_close(got[seen], wanted[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_decoder_layer_is_sparse_in_every_mode(batch_first, mode, forbidden):
    training, context = MODES[mode]
    make = {"dropout": 0.0, "batch_first": batch_first}
    theirs, ours = (nn.TransformerDecoderLayer(EMBED, HEADS, 32, **make).train(training) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    ours = with_sparse_attention(ours, batch_first, causal=True)
    cross = sparse(batch_first)
    cross.load_state_dict(theirs.multihead_attn.state_dict())
    ours.multihead_attn = cross
    ours.train(training)
    target, memory = torch.randn(2, 40, EMBED), torch.randn(2, LENGTH, EMBED)
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    self_hidden = forbidden(PATTERN, 40, heads=HEADS, causal=True, density=DENSITY).repeat(2, 1, 1)
    cross_hidden = forbidden(PATTERN, 40, LENGTH, heads=HEADS, density=DENSITY).repeat(2, 1, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(40)
    with context():
        wanted = theirs(target, memory, tgt_mask=self_hidden, memory_mask=cross_hidden)
        for arguments in ({}, {"tgt_mask": causal, "tgt_is_causal": True}, {"tgt_mask": causal}):
            torch.testing.assert_close(ours(target, memory, **arguments), wanted, rtol=1e-5, atol=1e-5)


def test_an_encoder_layer_trains_like_torchs_under_the_mask(hidden):
    theirs, ours = twins()
    x = torch.randn(2, LENGTH, EMBED)
    slope = torch.randn_like(x)
    (theirs(x, src_mask=hidden) * slope).sum().backward()
    (ours(x) * slope).sum().backward()
    for (name, wanted), got in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        error = (got.grad - wanted.grad).abs().max() / wanted.grad.abs().max()
        assert error < 1e-4, f"{name}: {error:.1e}"


def test_a_checkpoint_of_torchs_encoder_loads_into_the_sparse_one_and_back():
    theirs, ours = twins()
    pair = [nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) for layer in (theirs, ours)]
    torchs = {name: torch.randn_like(weight) for name, weight in pair[0].state_dict().items()}
    pair[0].load_state_dict(torchs)
    pair[1].load_state_dict(pair[0].state_dict(), strict=True)
    pair[0].load_state_dict({name: torch.zeros_like(weight) for name, weight in torchs.items()})
    pair[0].load_state_dict(pair[1].state_dict(), strict=True)
    for encoder in pair:
        torch.testing.assert_close(dict(encoder.state_dict()), torchs, rtol=0, atol=0)
