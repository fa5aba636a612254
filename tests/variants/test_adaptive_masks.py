"""A learned pattern under masks: what is hidden from a token changes no bit of its output, by no way at all."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from raybsa import BlockSparseAdaptive, BlockSparseDistributed, BlockSparseMultihead, DistributedConfig
from raybsa.comm import Communicator
from raybsa.variants.selector import METHODS, selector_loss
from tests.kernels.problems import relative_error
from tests.ranks import run_ranks

SIZE, TOKENS, HEADS = 8, 61, 4
INFINITY = float("inf")


def documents(cuts: tuple[int, ...], tokens: int = TOKENS) -> Tensor:
    """(1, tokens) numbers of the documents that begin at the cuts."""
    return (torch.arange(tokens)[:, None] >= torch.tensor(cuts)).sum(1)[None]


PACKED = torch.cat([documents((19, 40)), documents((8, 13, 48))])  # boundaries within blocks and at their edges
SCATTERED = torch.stack([torch.arange(TOKENS) * 7 % 3, torch.arange(TOKENS) // 4 * 5 % 3 - 1])
PADDED = torch.stack([torch.arange(TOKENS) >= 45, torch.arange(TOKENS) < 21])  # right, and left


def added(mask: Tensor, hidden: float) -> Tensor:
    """A mask that is added to the scores, with numbers of its own where it shows."""
    return torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)).masked_fill(~mask, hidden)


def same(ids: Tensor) -> Tensor:
    return (ids[:, :, None] == ids[:, None])[:, None]


BY_HEAD = (torch.arange(TOKENS)[:, None] + torch.arange(TOKENS) + 5 * torch.arange(HEADS)[:, None, None]) % 11 > 0
FIRST_APART = ~same(torch.arange(TOKENS)[None] // SIZE) | (torch.arange(TOKENS) % SIZE > 0) | torch.eye(TOKENS).bool()
MASKS: dict[str, dict[str, Any]] = {
    "documents": {"segment_ids": (PACKED.int(), PACKED.int())},
    "scattered segments": {"segment_ids": (SCATTERED, SCATTERED)},
    "padding as segments": {"segment_ids": (torch.zeros_like(PADDED, dtype=torch.int32), PADDED.int())},
    "padding": {"attn_mask": ~PADDED[:, None, None]},
    "padding, lowest number": {"attn_mask": added(~PADDED[:, None, None], torch.finfo(torch.float32).min)},
    "padding by head": {"attn_mask": (torch.arange(TOKENS) < torch.tensor([20, 33, 61, 50])[:, None])[:, None]},
    "documents as a mask": {"attn_mask": same(PACKED)},
    "documents as -inf": {"attn_mask": added(same(PACKED), -INFINITY)},
    "alternating blocks": {"attn_mask": same(torch.arange(TOKENS)[None] // SIZE % 2)},
    "first tokens apart": {"attn_mask": FIRST_APART},
    "padding of queries too": {"attn_mask": ~PADDED[:, None, :, None] & ~PADDED[:, None, None]},
    "band": {"attn_mask": (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() < 20},
    "lower triangle": {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()},
    "holes by head": {"attn_mask": added(BY_HEAD, -1e9)},
    "documents and padding": {"segment_ids": (PACKED, PACKED), "attn_mask": ~PADDED[:, None, None]},
    "padding and a triangle": {
        "segment_ids": (torch.zeros_like(PADDED).long(), PADDED.long()),
        "attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(),
    },
}


NO_PAIR_IS_WHOLE = ("scattered segments", "holes by head")  # and so none is judged by what is in it


def visible(masks: dict[str, Any], causal: bool, q_len: int = TOKENS, kv_len: int = TOKENS) -> Tensor:
    """(B, Sq, Skv) bool: whether a token sees another, in some head."""
    found = torch.ones(2, HEADS, q_len, kv_len, dtype=torch.bool)
    if causal:
        found &= torch.ones(q_len, kv_len, dtype=torch.bool).tril()
    if "segment_ids" in masks:
        of_queries, of_keys = masks["segment_ids"]
        found &= (of_queries[:, :, None] == of_keys[:, None])[:, None]
    if "attn_mask" in masks:
        mask = masks["attn_mask"]
        found &= mask if mask.dtype == torch.bool else mask > -1e4
    return found.any(1)


def make(method: str, *, causal: bool, **options: Any) -> BlockSparseAdaptive:
    given = {"num_kv_heads": 2, "density": 0.35, "block_size": SIZE, "causal": causal, "gate_dim": 8, "window": 1}
    model = BlockSparseAdaptive(num_heads=HEADS, head_dim=16, method=method, **given | options)
    for parameter in model.parameters():  # a gate that is far from its start
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def inputs(q_len: int = TOKENS, kv_len: int = TOKENS) -> list[Tensor]:
    return [torch.randn(2, n, s, 16, requires_grad=True) for n, s in ((HEADS, q_len), (2, kv_len), (2, kv_len))]


def changed(x: Tensor, sample: int, tokens: Tensor) -> Tensor:
    """``x`` with these tokens (S,) of a sample far off, and all of the other sample's."""
    off = x.detach() + 1e3 * torch.randn_like(x)
    off[sample] = torch.where(tokens[:, None], off[sample], x.detach()[sample])
    return off


def assert_nothing_hidden_comes_through(model: Any, masks: dict[str, Any], causal: bool, tensors: list[Tensor]) -> None:
    q_len, kv_len = tensors[0].shape[2], tensors[1].shape[2]
    sees = visible(masks, causal, q_len, kv_len)
    out = model(*tensors, **masks)
    for sample, token in ((0, 5), (0, 18), (0, 44), (0, 46), (1, 12), (1, 18), (1, 30), (1, q_len - 1)):
        keys = ~sees[sample, token]
        queries = keys.clone() if q_len == kv_len else torch.zeros(q_len, dtype=torch.bool)
        if "segment_ids" in masks:
            ids = masks["segment_ids"][0][sample]
            queries |= ids != ids[token]
        queries[token] = False
        hidden = [queries, keys, keys]
        others = [changed(x, sample, some) for x, some in zip(tensors, hidden, strict=True)]
        with torch.no_grad():
            assert torch.equal(model(*others, **masks)[sample, :, token], out[sample, :, token]), (sample, token)
        seen = out[sample, :, token].square().sum()
        if not seen.requires_grad:
            continue
        grads = torch.autograd.grad(seen, tensors, retain_graph=True, allow_unused=True)
        for gradient, some in zip(grads, hidden, strict=True):
            if gradient is not None:
                assert not gradient[sample][:, some].any(), (sample, token)
                assert not gradient[1 - sample].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.6, "sinks": 1}, {"density": 1.0}], ids=str)
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_what_is_hidden_from_a_token_changes_no_bit_of_its_output(method, causal, options, masks):
    assert_nothing_hidden_comes_through(make(method, causal=causal, **options), masks, causal, inputs())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["segments", "mask"])
def test_queries_that_are_no_keys_are_kept_apart_by_the_same_masks(method, causal, name):
    q_len, kv_len = 61, 90
    ids = documents((19, 40)).expand(2, -1), documents((30, 71), kv_len).expand(2, -1)
    masks = (
        {"segment_ids": ids} if name == "segments" else {"attn_mask": (ids[0][:, :, None] == ids[1][:, None])[:, None]}
    )
    model = make(method, causal=causal)
    assert_nothing_hidden_comes_through(model, masks, causal, inputs(q_len, kv_len))


@pytest.mark.parametrize("block_size", [1, 2, 32, 64])
@pytest.mark.parametrize("method", ["bias", "compressed"])
@pytest.mark.parametrize("name", ["documents", "scattered segments", "padding as segments", "holes by head"])
def test_it_holds_for_blocks_of_any_size(block_size, method, name):
    for causal in (False, True):
        model = make(method, causal=causal, block_size=block_size)
        assert_nothing_hidden_comes_through(model, MASKS[name], causal, inputs())


@pytest.mark.parametrize("method", ["distill", "compressed"])
def test_segments_of_a_dilated_pattern_bound_the_choice_beside_the_masks(method):
    for name in ("documents", "padding", "holes by head"):
        model = make(method, causal=False, segment_lengths=[32], dilation_rates=[1])
        assert_nothing_hidden_comes_through(model, MASKS[name], False, inputs())


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("as_mask", [False, True], ids=["segments", "mask"])
@pytest.mark.parametrize("top_p", [None, 0.6])
def test_a_document_of_whole_blocks_chooses_as_it_would_alone(method, causal, as_mask, top_p):
    cuts, tokens = [0, 48, 128, 160], 160
    ids = documents(tuple(cuts[1:-1]), tokens).expand(2, -1)
    masks = (same(ids), None) if as_mask else (None, (ids, ids))
    model = make(method, causal=causal, density=1.0, max_blocks=4, top_p=top_p)
    q, k, _ = inputs(tokens, tokens)
    together = model.source.select(q, k, *masks).layout.to_dense()
    for begin, end in pairwise(cuts):
        alone = model.source.select(q[:, :, begin:end], k[:, :, begin:end]).layout.to_dense()
        blocks = slice(begin // SIZE, end // SIZE)
        assert torch.equal(together[:, blocks, blocks], alone)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_row_keeps_hidden_blocks_only_where_it_has_no_others(method, causal):
    ids = documents((16, 72), 120).expand(2, -1)
    model = make(method, causal=causal, sinks=1, window=2)
    layout = model.source.select(*inputs(120, 120)[:2], None, (ids, ids)).layout
    of_blocks = ids[0, ::SIZE]
    shown = of_blocks[:, None] == of_blocks
    shown = shown.tril() if causal else shown
    assert torch.equal((layout.to_dense() & shown).sum(-1), torch.minimum(layout.row_counts, shown.sum(1)))


@pytest.mark.parametrize("method", METHODS)
def test_a_choice_follows_what_its_own_document_holds(method):
    """The masks take away what is hidden and no more: other tokens of a document do change its rows' choice."""
    model = make(method, causal=False, density=0.2)
    ids = documents((80,), 160).expand(2, -1)
    q, k, _ = inputs(160, 160)
    before = model.source.select(q, k, None, (ids, ids)).layout.to_dense()
    other = k.detach().clone()
    other[:, :, 80:] = other[:, :, 80:].flip(2)
    after = model.source.select(q, other, None, (ids, ids)).layout.to_dense()
    assert torch.equal(after[:, :10], before[:, :10])
    assert not torch.equal(after[:, 10:], before[:, 10:])


@pytest.mark.parametrize("method", ["bias", "compressed"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_under_a_mask_are_finite_and_reach_the_gate_by_what_it_may_look_at(method, name, causal):
    model = make(method, causal=causal)
    model(*inputs(), **MASKS[name]).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for parameter in (model.source.gate.query, model.source.gate.key):
        assert bool(parameter.grad.any()) == (name not in NO_PAIR_IS_WHOLE)


# ---- what is distilled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["padding as segments", "padding", "padding, lowest number"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("density", [0.35, 1.0])
def test_padding_changes_no_bit_of_the_loss_nor_of_the_gates_gradient(name, causal, density):
    model, tensors = make("distill", causal=causal, density=density), inputs()
    found = []
    for _ in range(2):
        model.zero_grad()
        model.source.passes.count = 0
        model(*tensors, **MASKS[name])
        loss = model.selector_loss()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        with torch.no_grad():
            for x in tensors:
                x += 1e3 * torch.randn_like(x) * PADDED[:, None, :, None]
    assert found[0][0] > 0
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.6}, {"density": 1.0}], ids=str)
def test_the_loss_under_a_mask_is_finite_and_trains_the_gate(name, causal, options):
    model = make("distill", causal=causal, **options)
    model(*inputs(), **MASKS[name])
    loss = model.selector_loss()
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.source.gate.waves.grad.abs().max() > 0
    for parameter in (model.source.gate.query, model.source.gate.key):
        assert bool(parameter.grad.any()) == (name not in NO_PAIR_IS_WHOLE)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("max_blocks", [None, 1000], ids=["dense", "chosen"])
@pytest.mark.parametrize("as_mask", [False, True], ids=["segments", "mask"])
def test_the_loss_of_a_document_packed_twice_is_that_of_the_document(causal, max_blocks, as_mask):
    model = make("distill", causal=causal, density=1.0, max_blocks=max_blocks, sample_rows=1000).double()
    alone = [x.detach().double() for x in inputs(80, 80)]
    ids = documents((80,), 160).expand(2, -1)
    model(*alone)
    wanted = model.selector_loss()
    masks = {"attn_mask": same(ids)} if as_mask else {"segment_ids": (ids, ids)}
    model(*(torch.cat([x, x], 2) for x in alone), **masks)
    torch.testing.assert_close(model.selector_loss(), wanted)


# ---- the drop-in ----------------------------------------------------------------------------------------------------

TRIANGLE = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
FORBIDDEN: dict[str, dict[str, Tensor]] = {
    "padding": {"key_padding_mask": PADDED},
    "padding as -inf": {"key_padding_mask": added(~PADDED, -INFINITY)},
    "documents": {"attn_mask": ~same(PACKED).expand(-1, 2, -1, -1).flatten(0, 1)},
    "a triangle and padding": {"attn_mask": TRIANGLE, "key_padding_mask": PADDED},
    "a triangle as numbers and padding": {
        "attn_mask": torch.zeros(TOKENS, TOKENS).masked_fill(TRIANGLE, -INFINITY),
        "key_padding_mask": added(~PADDED, torch.finfo(torch.float32).min),
    },
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_drop_in_for_multihead_attention_lets_nothing_hidden_through(method, causal, name):
    pattern = {"name": "adaptive", "params": {"method": method}}
    options = {"batch_first": True, "pattern": pattern, "density": 0.35, "block_size": SIZE, "causal": causal}
    model, masks = BlockSparseMultihead(32, 2, **options), FORBIDDEN[name]
    sees = torch.ones(2, TOKENS, TOKENS, dtype=torch.bool)
    if causal:
        sees = sees.tril()
    if (padding := masks.get("key_padding_mask")) is not None:
        sees = sees & ~(padding if padding.dtype == torch.bool else padding < -1e4)[:, None]
    if (mask := masks.get("attn_mask")) is not None:
        forbidden = mask if mask.dtype == torch.bool else mask < -1e4
        sees = sees & ~(forbidden if mask.dim() == 2 else forbidden[::2])
    x = torch.randn(2, TOKENS, 32)
    with torch.no_grad():
        out = model(x, x, x, need_weights=False, **masks)[0]
        for sample, token in ((0, 5), (0, 44), (1, 30), (1, TOKENS - 1)):
            hidden = ~sees[sample, token]
            hidden[token] = False
            other = x + 1e3 * torch.randn_like(x)
            other[sample] = torch.where(hidden[:, None], other[sample], x[sample])
            found = model(other, other, other, need_weights=False, **masks)[0]
            assert torch.equal(found[sample, token], out[sample, token]), (sample, token)


# ---- over ranks -----------------------------------------------------------------------------------------------------

RANKED = torch.cat([documents((50, 101, 160), 250), torch.arange(250)[None] // 24 % 2])  # in turn


def on_ranks(method: str, causal: bool, alone: BlockSparseAdaptive) -> BlockSparseDistributed:
    pattern = {"name": "adaptive", "params": {"method": method, "gate_dim": 8, "window": 1}}
    sizes = {"num_heads": HEADS, "head_dim": 16, "num_kv_heads": 2}
    config = DistributedConfig(partition="striped")
    model = BlockSparseDistributed(config, pattern=pattern, density=0.35, block_size=SIZE, causal=causal, **sizes)
    model.load_state_dict(alone.state_dict())
    return model


@pytest.mark.parametrize("method", ["distill", "bias", "mean-pool"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_other_documents_change_no_bit_of_an_output_over_ranks(method, causal, world_size):
    alone = make(method, causal=causal)
    tensors = [x.detach() for x in inputs(250, 250)]
    others = [torch.where((RANKED == 1)[:, None, :, None], x, x + 1e3 * torch.randn_like(x)) for x in tensors]

    def work(communicator: Communicator) -> list[Tensor]:
        model = on_ranks(method, causal, alone).bind(communicator)
        found = []
        for given in (tensors, others):
            ids = model.shard(RANKED, 1)
            found.append(model.gather(model(*(model.shard(x) for x in given), segment_ids=ids)))
        return found

    for before, after in run_ranks(world_size, work):
        of_document = (RANKED == 1)[:, None, :, None].expand_as(before)
        assert torch.equal(before[of_document], after[of_document])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("method", ["distill", "bias", "mean-pool"])
@pytest.mark.parametrize("causal", [False, True])
def test_ranks_choose_and_learn_under_segments_as_one_device_does(method, causal):
    alone = make(method, causal=causal).double()
    leaves = [x.detach().double().requires_grad_() for x in inputs(250, 250)]
    out = alone(*leaves, segment_ids=(RANKED, RANKED))
    out.square().sum().backward()

    def work(communicator: Communicator) -> tuple[Tensor, ...]:
        model = on_ranks(method, causal, alone).double().bind(communicator)
        given = [x.detach().requires_grad_() for x in leaves]
        ids = model.shard(RANKED, 1)
        rows = model(*(model.shard(x) for x in given), segment_ids=ids)
        (rows.square().sum() + 0.0 * selector_loss(model)).backward()
        gate = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        return model.gather(rows), *(x.grad for x in given), *gate

    results = run_ranks(3, work)
    for found in results:
        assert relative_error(found[0], out) <= 1e-10
    sums = [sum(parts) for parts in zip(*(found[1:] for found in results), strict=True)]
    wanted = [x.grad for x in leaves]
    wanted += [p.grad if p.grad is not None else torch.zeros_like(p) for p in alone.parameters()]
    for found, want in zip(sums, wanted, strict=True):
        assert relative_error(found, want) <= 1e-9


def test_ranks_losses_under_segments_add_up_to_one_devices():
    alone = make("distill", causal=True).double()
    tensors = [x.detach().double() for x in inputs(250, 250)]

    def work(communicator: Communicator) -> Tensor:
        model = on_ranks("distill", True, alone).double().bind(communicator)
        model(*(model.shard(x) for x in tensors), segment_ids=model.shard(RANKED, 1))
        return model.source.selector_loss().detach()

    one, *others = (sum(run_ranks(world_size, work)) for world_size in (1, 2, 3))
    assert one > 0
    for other in others:
        torch.testing.assert_close(other, one)


def test_segments_that_some_ranks_lack_are_an_error_on_every_rank():
    alone = make("distill", causal=True)

    def work(communicator: Communicator) -> str:
        model = on_ranks("distill", True, alone).bind(communicator)
        parts = [model.shard(x.detach()) for x in inputs(64, 64)]
        ids = model.shard(torch.zeros(2, 64, dtype=torch.int64), 1) if communicator.rank else None
        with pytest.raises(ValueError, match="ranks disagree on segments of a selection") as error:
            model(*parts, segment_ids=ids)
        return str(error.value)

    assert len(run_ranks(2, work)) == 2


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        (
            {"attn_mask": torch.ones(60, TOKENS)},
            ValueError,
            r"attn_mask must broadcast to \(2, 4, 61, 61\), got \(60, 61\)",
        ),
        (
            {"attn_mask": torch.ones(TOKENS, TOKENS).int()},
            TypeError,
            "must be bool .* or floating point, got torch.int32",
        ),
        (
            {"segment_ids": (PACKED, PACKED[:, :60])},
            ValueError,
            r"segment_ids must be a pair of int tensors \(2, 61\) and \(2, 61\), got torch.int64 \(2, 60\) for the key",
        ),
        ({"segment_ids": (PACKED.float(), PACKED)}, ValueError, r"got torch.float32 \(2, 61\) for the query side"),
    ],
)
def test_masks_that_do_not_fit_say_what_was_wanted(masks, error, message):
    with pytest.raises(error, match=message):
        make("distill", causal=True)(*inputs(), **masks)
