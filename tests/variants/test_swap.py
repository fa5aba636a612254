"""swap: other people's modules attend over our blocks. Over all blocks they compute what they did; else they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as by_another_name
from torch.utils.checkpoint import checkpoint

from raybsa import BlockSparseMultihead, patterns
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.variants.selector import BlockSelector, selector_loss
from raybsa.variants.swap import attending, served_by, swap, swap_attention

ALL = AttentionSpec("base", PatternSpec("dense"), block_size=8)
WINDOW = AttentionSpec("base", PatternSpec("sliding_window", {"window": 8}), block_size=8)
DENSE = AttentionSpec("dense")
B, H, S, D = 2, 2, 40, 8


class Attention(nn.Module):
    """Projections around one call, which ``attend(q, k, v)`` makes; x is (B, S, H * D)."""

    def __init__(self, attend: Callable[..., Tensor], kv_heads: int = H) -> None:
        super().__init__()
        self.attend, self.sizes = attend, (H, kv_heads, kv_heads)
        self.qkv = nn.Linear(H * D, sum(self.sizes) * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, D)).transpose(1, 2).split(self.sizes, 1)
        return x + self.attend(q, k, v).transpose(1, 2).flatten(2)


CAUSAL = torch.ones(S, S).tril().bool()
ADDED = torch.zeros(S, S).masked_fill(~CAUSAL, -torch.inf)
PADDING = (torch.arange(S) < torch.tensor([[S], [S - 9]]))[:, None, None]
SLOPES = ADDED - torch.tensor([0.5, 0.25])[:, None, None] * (torch.arange(S)[:, None] - torch.arange(S)).abs()
CALLS = {
    "plain": F.scaled_dot_product_attention,
    "causal, by another name": partial(by_another_name, is_causal=True),
    "a causal mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, CAUSAL),
    "a causal mask, added": partial(F.scaled_dot_product_attention, attn_mask=ADDED),
    "ALiBi": partial(F.scaled_dot_product_attention, attn_mask=SLOPES),
    "padding": partial(F.scaled_dot_product_attention, attn_mask=PADDING, scale=0.5),
    "from below": partial(F.scaled_dot_product_attention, attn_mask=CAUSAL.flip(0, 1)),
}


def grads(model: nn.Module, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), list(model.parameters())))


def assert_same_over_all_blocks(model: nn.Module, run: Callable[[], Tensor], attentions=(ALL,)) -> None:
    """Outputs and gradients over all blocks are those of torch; over a window they are not; undone, all is as before.

    Raw numbers say by how much: float32, so 1e-5.
    """
    before, classes = dict(model.state_dict()), [type(module) for module in model.modules()]
    wanted = run()
    for attention, same in ((attentions, True), ([WINDOW] * len(attentions), False)):
        undo = swap_attention(model, attention, run)
        found = run()
        assert torch.allclose(found, wanted, atol=1e-5) is same
        if same:
            for ours, theirs in zip(grads(model, found), grads(model, wanted), strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
        assert model.state_dict().keys() == before.keys()
        undo()
    assert [type(module) for module in model.modules()] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(run(), wanted)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_sdpa_over_all_blocks_is_that_call(name):
    model, x = Attention(CALLS[name]), torch.randn(B, S, H * D)
    assert_same_over_all_blocks(model, lambda: model(x))


def test_grouped_queries_are_served():
    model, x = Attention(partial(F.scaled_dot_product_attention, enable_gqa=True), kv_heads=1), torch.randn(B, S, H * D)
    assert_same_over_all_blocks(model, lambda: model(x))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, ~CAUSAL, ADDED], ids=["no mask", "bool", "added"])
def test_torch_s_multihead_over_all_blocks_is_torch_s_multihead(mask, batch_first):
    model = nn.MultiheadAttention(H * D, H, batch_first=batch_first)
    x = torch.randn(B, S, H * D) if batch_first else torch.randn(S, B, H * D)
    padding = torch.zeros(B, S, dtype=torch.bool) if mask is None or mask.dtype == torch.bool else None
    if padding is not None:
        padding[1, -9:] = True

    def run() -> Tensor:
        out, weights = model(x, x, x, attn_mask=mask, key_padding_mask=padding)  # with weights, as is its default
        return out.flatten() @ torch.linspace(0, 1, out.numel()) + weights.square().sum()

    assert_same_over_all_blocks(model, run)


def test_an_encoder_and_decoder_attend_each_in_their_own_way():
    """Encoder, causal decoder, and across: six modules with two lengths, and padding."""
    model = nn.Transformer(H * D, H, 2, 2, 32, dropout=0.0, batch_first=True)
    source, target = torch.randn(B, S, H * D), torch.randn(B, 24, H * D)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, -9:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(24)

    def run() -> Tensor:
        return model(source, target, tgt_mask=mask, src_key_padding_mask=padding, memory_key_padding_mask=padding)

    assert_same_over_all_blocks(model, run)
    found = {one.name: (one.call.k.shape[2], one.call.layout.causal) for one in attending(model, run)}
    assert found == {
        "encoder.layers.0.self_attn": (S, False),
        "encoder.layers.1.self_attn": (S, False),
        "decoder.layers.0.self_attn": (24, True),
        "decoder.layers.0.multihead_attn": (S, False),
        "decoder.layers.1.self_attn": (24, True),
        "decoder.layers.1.multihead_attn": (S, False),
    }


def test_an_encoder_in_eval_does_not_take_torch_s_fused_path():
    layer = nn.TransformerEncoderLayer(H * D, H, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(B, S, H * D)
    with torch.no_grad():
        wanted = model(x)
        undo = swap_attention(model, [ALL], lambda: model(x))
        torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)
        undo()
        swap_attention(model, [WINDOW], lambda: model(x))
        assert not torch.allclose(model(x), wanted, atol=1e-3)


def test_each_module_gets_its_own_attention_by_its_number_and_a_dense_one_stays_torch_s():
    model = nn.Sequential(*(Attention(CALLS["causal, by another name"]) for _ in range(3)))
    x = torch.randn(B, S, H * D)
    seen = []
    swap_attention(model, [DENSE, WINDOW, ALL], lambda: model(x))
    for module in model:
        module.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    model(x)
    rule = patterns.build(WINDOW.pattern).layout(S, num_heads=H, q_block_size=8, causal=True)
    kept = rule.to_dense().repeat_interleave(8, 1).repeat_interleave(8, 2) & CAUSAL
    for (module, given, out), mask in zip(seen, (CAUSAL, kept, CAUSAL), strict=True):
        module.attend = partial(F.scaled_dot_product_attention, attn_mask=mask)
        plain = Attention.forward(module, given)
        torch.testing.assert_close(out, plain, atol=1e-5, rtol=1e-5)


def test_a_multihead_that_stays_dense_is_torch_s_beside_one_that_does_not():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(H * D, H, 32, 0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    x = torch.randn(B, S, H * D)
    wanted = model(x)
    swap_attention(model, [ALL, DENSE], lambda: model(x))
    assert [isinstance(layer.self_attn, BlockSparseMultihead) for layer in model.layers] == [True, False]
    torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)


def test_the_point_of_a_search_loads_as_it_is():
    model, x = Attention(CALLS["causal, by another name"]), torch.randn(B, S, H * D)
    swap_attention(model, [WINDOW.factory_arguments(causal=True)], lambda: model(x))
    found = model(x)
    swap_attention(fresh := Attention(CALLS["causal, by another name"]), [WINDOW], lambda: fresh(x))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(found, fresh(x))
    learned = AttentionSpec("adaptive", PatternSpec("adaptive"), density=0.5, block_size=8)
    point = TrialSpec("module", (learned,), num_heads=4 * H, head_dim=2 * D).factory_arguments(0)
    swap_attention(fresh := Attention(CALLS["causal, by another name"]), [point], lambda: fresh(x))
    selectors = [module for module in fresh.modules() if isinstance(module, BlockSelector)]
    assert [(one.num_heads, one.head_dim) for one in selectors] == [(H, D)], "its own heads, not the largest module's"


def test_a_recomputed_forward_attends_alike():
    model, x = Attention(CALLS["plain"]), torch.randn(B, S, H * D)
    swap_attention(model, [WINDOW], lambda: model(x))
    plain = grads(model, model(x))
    again = grads(model, checkpoint(model, x, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_an_error_inside_of_the_model_leaves_no_trace():
    model = Attention(CALLS["plain"])
    swap_attention(model, [WINDOW], lambda: model(torch.randn(B, S, H * D)))
    with pytest.raises(RuntimeError):
        model(torch.randn(3))
    q = torch.randn(1, 1, S, D)
    assert F.scaled_dot_product_attention(q, q, q).shape == q.shape, "torch's own again, which no module serves"
    assert torch.isfinite(model(torch.randn(B, S, H * D))).all()


def test_a_learned_source_is_a_part_of_its_module_and_learns():
    learned = AttentionSpec("adaptive", PatternSpec("adaptive"), density=0.5, block_size=8)
    model = nn.Sequential(Attention(CALLS["causal, by another name"]), Multihead())
    x = torch.randn(B, S, H * D)
    swap_attention(model, [learned], lambda: model(x))
    assert sum(isinstance(module, BlockSelector) for module in model.modules()) == 2
    (model(x).square().mean() + selector_loss(model)).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "gate" in name)
    assert {name.split(".")[1] for name in model.state_dict() if "gate" in name} == {"raybsa_source", "attend"}


class Multihead(nn.Module):
    """An nn.MultiheadAttention with its residual."""

    def __init__(self, attend: nn.MultiheadAttention | None = None) -> None:
        super().__init__()
        self.attend = attend or nn.MultiheadAttention(H * D, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x, x, x, need_weights=False)[0]


# ---- what is refused -----------------------------------------------------------------------------------------------


class Derived(nn.MultiheadAttention):
    """A class of one's own."""


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads and batch in one dimension, as some models have it."""
    return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, q.shape[:2])


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (Attention(folded), r"module '0': q must be a tensor \(batch, heads, tokens, head_dim\), got \(4, 40, 8\)"),
        (Attention(twice), r"module '0': calls of one module with the same .* were wanted, got .*False\) and .*True"),
        (Multihead(Derived(H * D, H)), r"module '0.attend': .*nn.MultiheadAttention itself was wanted"),
        (Multihead(BlockSparseMultihead(H * D, H, batch_first=True)), "module '0.attend': .*block-sparse already"),
    ],
    ids=["three dimensions", "causal and not", "a class made from it", "ours already"],
)
def test_what_cannot_be_swapped_exactly_is_refused_by_name(inner, message):
    model = nn.Sequential(inner)
    with pytest.raises(NotImplementedError, match=message):
        attending(model, lambda: model(torch.randn(B, S, H * D)))
    assert not inner._forward_hooks, "what was refused is left as it was"


def test_attention_outside_of_every_module_is_refused_where_it_would_stay_dense_unnoticed():
    model, q = Attention(CALLS["plain"]), torch.randn(B, H, S, D)
    with pytest.raises(
        NotImplementedError, match="in it was wanted, got scaled_dot_product_attention called from else"
    ):
        attending(model, lambda: F.scaled_dot_product_attention(q, q, q))


def test_a_later_call_that_its_source_cannot_serve_is_refused_by_name():
    attention = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attention.mask))
    model, x = nn.Sequential(attention), torch.randn(B, S, H * D)
    attention.mask = CAUSAL
    swap_attention(model, [WINDOW], lambda: model(x))
    attention.mask = torch.ones(S, S).bool()
    with pytest.raises(
        NotImplementedError, match="module '0': a causal call was wanted, as its first one: this one shows later"
    ):
        model(x)


def test_a_module_that_did_not_attend_before_is_refused_by_name():
    model, x = nn.Sequential(Attention(CALLS["plain"]), nn.Identity()), torch.randn(B, S, H * D)
    swap(model, served_by(attending(model, lambda: model(x)), [WINDOW], model))
    model[1].forward = lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])
    with pytest.raises(NotImplementedError, match="module '1': it attends, but only module '0' did"):
        model(x)


def test_another_number_of_attentions_or_another_variant_is_refused():
    model, x = Attention(CALLS["plain"]), torch.randn(B, S, H * D)
    with pytest.raises(ValueError, match=r"got 2 for 1 \(the model itself\)"):
        swap_attention(model, [WINDOW, ALL], lambda: model(x))
    with pytest.raises(ValueError, match=r"by the variants .*, got 'distributed'"):
        swap_attention(model, [AttentionSpec("distributed", PatternSpec("random"))], lambda: model(x))
    with pytest.raises(ValueError, match="at work, got Linear, which has neither"):
        swap_attention(nn.Linear(2, 2), [WINDOW], lambda: None)


def test_a_compiled_model_is_refused():
    model, x = nn.Sequential(Attention(CALLS["plain"])), torch.randn(B, S, H * D)
    model[0].compile(backend="eager")
    with pytest.raises(NotImplementedError, match="module '0': a model that is not compiled was wanted"):
        attending(model, lambda: model(x))


def test_a_swapped_model_is_copied_whole_and_not_swapped_twice():
    model, x = nn.Sequential(Attention(CALLS["plain"]), Multihead()), torch.randn(B, S, H * D)
    undo = swap_attention(model, [WINDOW], lambda: model(x))
    wanted, copied = model(x), copy.deepcopy(model)
    with pytest.raises(NotImplementedError, match="the model itself: it is swapped already"):
        swap_attention(model, [ALL], lambda: model(x))
    assert torch.equal(model(x), wanted), "a refusal undoes nothing"
    undo()
    assert torch.equal(copied(x), wanted)
    assert not torch.allclose(model(x), wanted, atol=1e-3)
