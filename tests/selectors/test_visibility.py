"""What a choice may look at under masks, compared with the masks token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from raybsa.selectors import mask_blocks
from raybsa.selectors.mask_blocks import MaskBlocks, with_infinity
from raybsa.selectors.pooling import block_stats, per_head
from raybsa.selectors.rules import Rules
from raybsa.selectors.visibility import Visibility

SIZE, HEADS, KV_HEADS = 4, 4, 2
Q_LEN, KV_LEN = 30, 41
PACKED = torch.tensor([0] * 9 + [1] * 7 + [2] * 14)[None].expand(2, -1)
OF_KEYS = torch.tensor([0] * 12 + [3] * 6 + [2] * 20 + [1] * 3)[None].expand(2, -1)


def scattered(tokens: int) -> Tensor:
    return torch.randint(-2, 2, (2, -(-tokens // 3))).repeat_interleave(3, 1)[:, :tokens]


def holes(*shape: int) -> Tensor:
    """A mask that is True but for some rectangles."""
    mask = torch.ones(shape, dtype=torch.bool)
    for _ in range(6):
        row, col = int(torch.randint(shape[-2], ())), int(torch.randint(shape[-1], ()))
        mask[..., row : row + 5, col : col + 9] &= torch.rand(*shape[:-2], 1, 1) < 0.5
    return mask


def cases() -> dict[str, tuple[int, Tensor | None, tuple[Tensor, Tensor] | None]]:
    """Number of keys, mask, segments."""
    padding = torch.arange(Q_LEN) < torch.tensor([[11], [30]])
    return {
        "packed": (Q_LEN, None, (PACKED, PACKED)),
        "of another length": (KV_LEN, None, (PACKED, OF_KEYS)),
        "scattered": (Q_LEN, None, (ids := scattered(Q_LEN), ids)),
        "padding": (Q_LEN, None, (torch.zeros_like(PACKED), (~padding).long())),
        "mask": (Q_LEN, holes(Q_LEN, Q_LEN), None),
        "mask by head": (KV_LEN, holes(2, HEADS, Q_LEN, KV_LEN), None),
        "mask of one row": (Q_LEN, padding[:, None, None], None),
        "one row a head": (Q_LEN, torch.rand(HEADS, 1, Q_LEN) < 0.8, None),
        "numbers": (Q_LEN, torch.zeros(2, 1, Q_LEN, Q_LEN).masked_fill(~holes(2, 1, Q_LEN, Q_LEN), -1e4), None),
        "both": (Q_LEN, holes(2, 1, Q_LEN, Q_LEN), (PACKED, PACKED)),
    }


def of_case(name: str, causal: bool = False) -> tuple[Visibility, Tensor]:
    """What is visible by blocks, and by tokens (B, Hkv, copies, Sq, Skv)."""
    torch.manual_seed(3)
    kv_len, mask, ids = cases()[name]
    q, k = torch.randn(2, HEADS, Q_LEN, 8), torch.randn(2, KV_HEADS, kv_len, 8)
    found = Visibility.of(5, Rules(SIZE, causal), q, k, mask, ids)
    assert found is not None
    seen = torch.ones(2, HEADS, Q_LEN, kv_len, dtype=torch.bool)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask > -1e4)
    if ids is not None:
        seen = seen & (ids[0][:, :, None] == ids[1][:, None])[:, None]
    return found, seen.unflatten(1, (KV_HEADS, -1))


def pairs(found: Visibility, rows: int, columns: int) -> list[Tensor]:
    return [x.expand(2, KV_HEADS, rows, columns) for x in found.tile(slice(None))]


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("causal", [False, True])
def test_a_judged_pair_sees_each_other_whole_and_a_hidden_one_not_at_all(name, causal):
    found, seen = of_case(name, causal)
    kv_len = seen.shape[-1]
    rows, columns = -(-Q_LEN // SIZE), -(-kv_len // SIZE)
    judged, hidden = pairs(found, rows, columns)
    keys = found.keys.expand(2, KV_HEADS, kv_len)
    sees = seen.any(2).any(-1)  # queries
    before = torch.zeros(2, KV_HEADS, columns, dtype=torch.bool) | found.keys_before
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in judged.shape)).tolist():
        of_row = slice(SIZE * i, SIZE * i + SIZE)
        told = keys[b, h].clone()  # the keys of which the column tells
        told[: SIZE * (j - before[b, h, j].long())] = False
        told[SIZE * j + SIZE :] = False
        tokens = seen[b, h][:, of_row]
        if judged[b, h, i, j]:
            assert tokens[:, sees[b, h, of_row]][..., told].all()
            assert not hidden[b, h, i, j]
        if hidden[b, h, i, j]:
            assert not tokens[..., SIZE * j : SIZE * j + SIZE].any()
    assert judged.any()


@pytest.mark.parametrize("name", ["packed", "padding", "mask", "mask by head", "mask of one row", "one row a head"])
def test_every_pair_in_which_no_token_sees_another_is_hidden(name):
    found, seen = of_case(name)
    shape = [-(-n // SIZE) for n in seen.shape[-2:]]
    whole = torch.zeros(2, KV_HEADS, *(SIZE * n for n in shape), dtype=torch.bool)
    whole[..., :Q_LEN, : seen.shape[-1]] = seen.any(2)
    wanted = ~whole.unflatten(-1, (-1, SIZE)).unflatten(2, (-1, SIZE)).any(5).any(3)
    assert torch.equal(pairs(found, *shape)[1], wanted)


@pytest.mark.parametrize("name", cases())
def test_single_pairs_are_those_of_the_tiles(name):
    found, seen = of_case(name)
    rows, columns = (-(-n // SIZE) for n in seen.shape[-2:])
    group, place, column = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (4, rows, columns)), indexing="ij"))
    for one, tile in zip(found.at(group, place, column, KV_HEADS), pairs(found, rows, columns), strict=True):
        assert torch.equal(one, tile.flatten())
    for one, tile in zip(found.tile(torch.tensor([1, 4])), found.tile(slice(None)), strict=True):
        assert torch.equal(one.expand(-1, -1, 2, -1), tile.expand(-1, -1, rows, -1)[:, :, [1, 4]])


@pytest.mark.parametrize("name", ["packed", "of another length", "scattered", "padding"])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_as_tokens_share_an_id_where_they_are_judged(name, causal):
    found, _ = of_case(name, causal)
    mask, (of_rows, of_columns) = found.among_blocks()
    assert mask is None
    assert torch.equal((of_rows[:, :, None] == of_columns[:, None])[:, None], found.tile(slice(None))[0])


def test_documents_of_whole_blocks_are_judged_throughout_and_their_seams_not_crossed():
    ids = torch.tensor([0] * 8 + [1] * 12 + [2] * 8)[None]
    q = torch.randn(1, 1, 28, 8)
    same = (ids[:, :, None] == ids[:, None])[:, None]
    of_blocks = ids[0, ::SIZE]
    wanted = of_blocks[:, None] == of_blocks
    for masks in ((None, (ids, ids)), (same, None)):
        for causal in (False, True):
            found = Visibility.of(5, Rules(SIZE, causal), q, q, *masks)
            judged = found.tile(slice(None))[0][0, 0]
            assert torch.equal(judged.tril(-1), wanted.tril(-1))
            assert causal or torch.equal(judged, wanted)
            assert torch.equal(found.tile(slice(None))[1][0, 0], ~wanted)
            follows = torch.tensor([False, True, False, True, True, False, True])
            assert not (found.keys_before[0, 0] & ~follows).any()
            assert causal or torch.equal(found.keys_before[0, 0], follows)
            assert torch.equal(found.reads_before[0, 0], follows)


def test_under_a_causal_window_rows_judge_what_lies_whole_within_it():
    q = torch.randn(1, 1, 32, 8)
    at = torch.arange(32)
    for width, reach, reads_before in ((4, 0, False), (8, 1, False), (12, 2, True), (16, 3, True)):
        window = (at[:, None] - at < width) & (at <= at[:, None])
        found = Visibility.of(5, Rules(SIZE, True), q, q, window, None)
        judged, hidden = (x[0, 0] for x in found.tile(slice(None)))
        rows = torch.arange(8)
        distance = rows[:, None] - rows
        # Farthest within the window the block before is not: there the pair is left to its position.
        wanted = (distance > 0) & (distance <= reach - reads_before)
        wanted[:, 0] = (rows > 0) & (rows <= reach)  # before it there is none
        assert torch.equal(judged, wanted)
        assert torch.equal(hidden, (distance < 0) | (distance > (width + 2) // SIZE))


@pytest.mark.parametrize("at_once", [1, 500, 10**9])
def test_a_mask_is_read_in_tiles_of_any_size(at_once, monkeypatch):
    mask = holes(2, HEADS, Q_LEN, KV_LEN)
    wanted = MaskBlocks.of(mask, Q_LEN, KV_LEN, KV_HEADS, SIZE, False)
    monkeypatch.setitem(mask_blocks._AT_ONCE, "cpu", at_once)
    found = MaskBlocks.of(mask, Q_LEN, KV_LEN, KV_HEADS, SIZE, False)
    for name in ("judged", "seen", "sees", "shown", "reads_before"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_lowest_number_of_any_dtype_hides_and_becomes_minus_infinity(dtype):
    mask = torch.tensor([0.0, -9e3, torch.finfo(dtype).min, -float("inf"), 3.0]).to(dtype)
    hidden = torch.tensor([False, False, True, True, False])
    assert torch.equal(with_infinity(mask) == -float("inf"), hidden)
    assert torch.equal(with_infinity(mask)[~hidden], mask[~hidden])
    assert with_infinity(~hidden) is not None
    assert with_infinity(None) is None


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_statistics_of_some_tokens_are_those_of_the_others_left_out(groups: int):
    x = torch.randn(2, 4, 22, 5, dtype=torch.float64, requires_grad=True)
    taken = torch.rand(2, groups, 22) < 0.6
    taken[0, :, 8:12] = False
    stats = block_stats(x, SIZE, taken)
    of_heads: Any = per_head(taken, 4).expand(-1, 4, -1)
    for b, h, block in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(6)).tolist():
        some = of_heads[b, h, SIZE * block : SIZE * block + SIZE]
        own = x[b, h, SIZE * block : SIZE * block + SIZE]
        wanted = torch.zeros(3, 5, dtype=torch.float64)
        if some.any():
            wanted = torch.stack([own[some].mean(0), own[some].amax(0), own[0] * some[0]])
        torch.testing.assert_close(stats[b, h, block], wanted)
    assert not torch.autograd.grad(stats.square().sum(), x)[0][~of_heads].any()
