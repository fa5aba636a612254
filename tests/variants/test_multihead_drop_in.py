"""BlockSparseMultihead with the dense pattern is nn.MultiheadAttention: outputs, weights, gradients, in every mode."""

import inspect

import pytest
import torch
from torch import nn

from raybsa.variants.multihead import BlockSparseMultihead

EMBED, HEADS, BATCH, Q_LEN, KV_LEN = 16, 4, 3, 13, 21

SHAPES = ["batch_first", "length_first", "unbatched"]
MODULES = {
    "self": {},
    "self_without_bias": {"bias": False},
    "cross": {},
    "cross_of_other_widths": {"kdim": 10, "vdim": 12},
    "cross_without_bias_of_other_widths": {"kdim": 10, "vdim": 12, "bias": False},
    "add_bias_kv": {"add_bias_kv": True},
    "add_zero_attn": {"add_zero_attn": True},
    "both_extras": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 12},
}

KINDS_AND_SHAPES = [
    *((kind, "batch_first") for kind in MODULES),
    *((kind, shape) for kind in ("self", "cross_of_other_widths", "both_extras") for shape in SHAPES[1:]),
]


def pair(shape: str, **options) -> tuple[nn.MultiheadAttention, BlockSparseMultihead]:
    """Torch's module and ours with the same random weights, biases included."""
    options["batch_first"] = shape == "batch_first"
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.4)
    ours = BlockSparseMultihead(EMBED, HEADS, **options, pattern="dense", block_size=8)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_inputs(kind: str, shape: str, options) -> list[torch.Tensor]:
    """query, key and value; one and the same tensor for self-attention."""

    def one(length: int, width: int) -> torch.Tensor:
        sizes = {
            "batch_first": (BATCH, length, width),
            "length_first": (length, BATCH, width),
            "unbatched": (length, width),
        }
        return torch.randn(sizes[shape], requires_grad=True)

    if kind.startswith("self"):
        return [one(Q_LEN, EMBED)] * 3
    return [one(Q_LEN, EMBED), one(KV_LEN, options.get("kdim", EMBED)), one(KV_LEN, options.get("vdim", EMBED))]


def make_masks(attn: str, padding: str, kv_len: int, batch: int) -> dict[str, torch.Tensor | None]:
    """Masks that leave every query its first key."""
    masks: dict[str, torch.Tensor | None] = {"attn_mask": None, "key_padding_mask": None}
    if attn != "none":
        size = (Q_LEN, kv_len) if "2d" in attn else (batch * HEADS, Q_LEN, kv_len)
        forbidden = torch.rand(size) < 0.4
        forbidden[..., 0] = False
        masks["attn_mask"] = forbidden if "bool" in attn else torch.randn(size).masked_fill(forbidden, float("-inf"))
    if padding != "none":
        ignored = torch.arange(kv_len) >= torch.tensor([kv_len, kv_len - 4, 5])[:batch, None]
        masks["key_padding_mask"] = (
            ignored if padding == "bool" else torch.randn(batch, kv_len).masked_fill(ignored, float("-inf"))
        )
    return masks


def assert_equal_in_all(theirs, ours, inputs, **arguments) -> None:
    """Outputs, weights, and the gradients of every distinct input and parameter."""
    results = []
    for module in (theirs, ours):
        out, weights = module(*inputs, **arguments)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        if weights is not None:
            loss = loss + (weights * torch.linspace(-1, 1, weights.numel()).view_as(weights)).sum()
        wanted = [*dict.fromkeys(inputs), *module.parameters()]
        results.append([out, *torch.autograd.grad(loss, wanted), *([] if weights is None else [weights])])
    for wanted, got in zip(*results, strict=True):
        assert got.shape == wanted.shape
        error = (got - wanted).abs().max() / wanted.abs().max()
        assert error <= 1e-5, f"relative error {error:.1e} of a tensor {tuple(wanted.shape)}"


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("attn", ["none", "2d_bool", "2d_float", "3d_bool", "3d_float"])
@pytest.mark.parametrize(("kind", "shape"), KINDS_AND_SHAPES)
def test_outputs_weights_and_gradients_equal_torchs_under_every_mask(kind, shape, attn, padding):
    options = MODULES[kind]
    theirs, ours = pair(shape, **options)
    inputs = make_inputs(kind, shape, options)
    kv_len, batch = inputs[1].shape[0 if shape != "batch_first" else 1], 1 if shape == "unbatched" else BATCH
    masks = make_masks(attn, padding, kv_len, batch)
    if shape == "unbatched" and masks["key_padding_mask"] is not None:
        masks["key_padding_mask"] = masks["key_padding_mask"][0]
    for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        assert_equal_in_all(theirs, ours, inputs, **masks, **weights)


@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("causal", [False, True], ids=["hint_only", "causal_module"])
def test_the_causal_hint_equals_torchs_whether_or_not_the_module_is_causal(causal, need_weights, padding):
    theirs, ours = pair("batch_first")
    ours = BlockSparseMultihead(EMBED, HEADS, batch_first=True, pattern="dense", block_size=8, causal=causal)
    ours.load_state_dict(theirs.state_dict())
    inputs = make_inputs("self", "batch_first", {})
    mask = torch.triu(torch.ones(Q_LEN, Q_LEN, dtype=torch.bool), 1)
    masks = make_masks("none", padding, Q_LEN, BATCH) | {"attn_mask": mask}
    assert_equal_in_all(theirs, ours, inputs, **masks, need_weights=need_weights, is_causal=True)


def test_a_causal_module_is_causal_without_any_mask():
    theirs, _ = pair("batch_first")
    ours = BlockSparseMultihead(EMBED, HEADS, batch_first=True, pattern="dense", block_size=8, causal=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(BATCH, Q_LEN, EMBED)
    mask = torch.triu(torch.ones(Q_LEN, Q_LEN, dtype=torch.bool), 1)
    wanted = theirs(x, x, x, attn_mask=mask)
    for hint in (False, True):
        for got, want in zip(ours(x, x, x, is_causal=hint), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_it_equals_torchs_own_fast_path_in_inference():
    theirs, ours = (module.eval() for module in pair("batch_first"))
    x = torch.randn(BATCH, Q_LEN, EMBED)
    padding = torch.arange(Q_LEN) >= torch.tensor([13, 9, 4])[:, None]
    with torch.inference_mode():
        for got, want in zip(
            ours(x, x, x, key_padding_mask=padding), theirs(x, x, x, key_padding_mask=padding), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_is_as_near_to_float64_as_torch_is():
    modules = [module.to(torch.bfloat16) for module in pair("batch_first")]
    x = torch.randn(BATCH, Q_LEN, EMBED, dtype=torch.bfloat16)
    got = [module(x, x, x) for module in modules]
    exact = modules[0].double()(*[x.double()] * 3)
    for theirs, ours, wanted in zip(*got, exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        error, budget = ((y - wanted).abs().max() for y in (ours, theirs))
        assert error <= 1.5 * budget, f"error {error:.1e}, torch's own {budget:.1e}"


def test_a_learned_attn_mask_gets_torchs_gradient():
    theirs, ours = pair("length_first")
    inputs = make_inputs("cross", "length_first", {})
    for size in ((Q_LEN, KV_LEN), (BATCH * HEADS, Q_LEN, KV_LEN)):
        mask = torch.randn(size, requires_grad=True)
        grads = [
            torch.autograd.grad(m(*inputs, attn_mask=mask, need_weights=False)[0].square().sum(), mask)
            for m in (theirs, ours)
        ]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
def test_one_seed_makes_the_same_weights_and_state_dicts_load_strictly_both_ways(options):
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    torch.manual_seed(5)
    ours = BlockSparseMultihead(EMBED, HEADS, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    other = BlockSparseMultihead(EMBED, HEADS, **options)
    other.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(other.state_dict(), strict=True)


def test_torchs_arguments_come_first_in_their_order_and_with_their_defaults():
    def described(function) -> list[tuple]:
        return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]

    torchs = described(nn.MultiheadAttention.__init__)
    assert described(BlockSparseMultihead.__init__)[: len(torchs)] == torchs
    assert all(
        kind is inspect.Parameter.KEYWORD_ONLY for _, _, kind in described(BlockSparseMultihead.__init__)[len(torchs) :]
    )
    assert described(BlockSparseMultihead.forward) == described(nn.MultiheadAttention.forward)


def test_a_query_with_nothing_to_attend_gives_the_output_bias_and_no_nan_anywhere():
    _, ours = pair("batch_first")
    x = torch.randn(2, Q_LEN, EMBED, requires_grad=True)
    padding = torch.zeros(2, Q_LEN, dtype=torch.bool)
    padding[1] = True
    for mask in (padding, torch.zeros(2, Q_LEN).masked_fill(padding, float("-inf"))):
        out, weights = ours(x, x, x, key_padding_mask=mask)
        torch.testing.assert_close(out[1], ours.out_proj.bias.expand(Q_LEN, EMBED))
        assert not weights[1].any()
        grads = torch.autograd.grad(out.sum() + weights.square().sum(), [x, *ours.parameters()])
        assert all(g.isfinite().all() for g in grads)


def test_the_parameters_can_be_drawn_again():
    ours = BlockSparseMultihead(EMBED, HEADS)
    before = ours.in_proj_weight.clone()
    ours._reset_parameters()
    assert not torch.equal(ours.in_proj_weight, before)
    assert not ours._qkv_same_embed_dim
