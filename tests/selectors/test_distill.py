"""What is distilled: the whole attention of sampled rows, and the divergence of the gate from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from raybsa import BlockSparseAdaptive
from raybsa.selectors import row_mass as module
from raybsa.selectors.distill import divergence, rows_divergence, sampled_rows
from raybsa.selectors.row_mass import row_mass
from raybsa.selectors.rules import Rules

SIZE, Q_LEN, KV_LEN = 8, 60, 75
SEGMENTS = ((32, 1), (64, 2))


def dense_mass(q, k, rules, rows, visible, added, sharpness=1.0):
    """Attention of all pairs of tokens, summed by blocks."""
    blocks = rules.candidates(torch.arange(8), 10).repeat_interleave(SIZE, 0).repeat_interleave(SIZE, 1)
    seen = visible & blocks[:Q_LEN, :KV_LEN]
    if rules.causal:
        seen = seen & torch.ones(Q_LEN, KV_LEN, dtype=torch.bool).tril()
    scores = 0.3 * q @ k.repeat_interleave(2, 1).transpose(-1, -2) + added
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    weights = F.pad(weights, (0, 80 - KV_LEN, 0, 64 - Q_LEN))
    sums = weights.unflatten(-1, (10, SIZE)).sum(-1).pow(sharpness).unflatten(2, (8, SIZE)).sum(3)
    return sums.unflatten(1, (2, 2)).mean(2)[:, :, rows]


@pytest.mark.parametrize("tile", [2**20, 2 * 4 * KV_LEN * 20, 2 * 4 * KV_LEN * 3, 1])
@pytest.mark.parametrize("rules", [Rules(SIZE, True), Rules(SIZE, False), Rules(SIZE, True, SEGMENTS)], ids=str)
def test_the_mass_of_rows_is_that_of_dense_attention_however_it_is_tiled(tile, rules, monkeypatch):
    monkeypatch.setitem(module.TILE_SCORES, "cpu", tile)
    q, k = (torch.randn(2, heads, n, 4, dtype=torch.float64) for heads, n in ((4, Q_LEN), (2, KV_LEN)))
    rows = torch.tensor([0, 3, 4, 7])
    every = torch.ones(Q_LEN, KV_LEN, dtype=torch.bool)
    torch.testing.assert_close(row_mass(q, k, 0.3, rules, rows), dense_mass(q, k, rules, rows, every, 0.0))
    ids = torch.arange(Q_LEN).expand(2, -1) // 20, torch.arange(KV_LEN).expand(2, -1) // 25
    apart = (ids[0][:, :, None] == ids[1][:, None])[:, None]
    found = row_mass(q, k, 0.3, rules, rows, None, ids)
    torch.testing.assert_close(found, dense_mass(q, k, rules, rows, apart, 0.0))
    for shape in ((KV_LEN,), (Q_LEN, KV_LEN), (2, 1, Q_LEN, 1), (4, 1, KV_LEN)):
        mask = torch.rand(shape) < 0.7
        found = row_mass(q, k, 0.3, rules, rows, mask)
        torch.testing.assert_close(found, dense_mass(q, k, rules, rows, mask, 0.0))
        added = torch.randn(shape, dtype=torch.float64)
        found = row_mass(q, k, 0.3, rules, rows, added)
        torch.testing.assert_close(found, dense_mass(q, k, rules, rows, every, added))
    found = row_mass(q, k, 0.3, rules, rows, sharpness=3.0)
    torch.testing.assert_close(found, dense_mass(q, k, rules, rows, every, 0.0, 3.0))


def test_one_query_that_needs_a_block_outweighs_many_that_look_everywhere():
    """Seven queries of the last row look a little more at block 1 than elsewhere, the eighth at block 2 alone."""
    q, k = torch.zeros(1, 1, 64, 4), torch.zeros(1, 1, 64, 4)
    k[:, :, 8:16, 0], q[:, :, 56:63, 0] = 1.0, 1.5
    k[:, :, 16:24, 1], q[:, :, 63, 1] = 1.0, 9.0
    plain, sharp = (row_mass(q, k, 1.0, Rules(8, True), torch.tensor([7]), sharpness=p)[0, 0, 0] for p in (1.0, 4.0))
    assert plain.argmax() == 1
    assert sharp.argmax() == 2


def test_the_divergence_and_its_gradient_are_those_of_two_softmaxes():
    scores = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    mass, settled = torch.rand(2, 5, 7, dtype=torch.float64), torch.rand(5, 7) < 0.3
    settled[0] = True
    found, weight = divergence(scores * 20, mass, settled)
    wanted = [
        row.sum() * F.kl_div((s[~out] * 20).log_softmax(-1), row / row.sum(), reduction="sum")
        for s, m, out in zip(scores.flatten(0, 1), mass.flatten(0, 1), settled.repeat(2, 1), strict=True)
        if (row := m[~out]).numel()
    ]
    torch.testing.assert_close(found, torch.stack(wanted).sum())
    torch.testing.assert_close(weight, mass.masked_fill(settled, 0.0).sum())
    ours, theirs = (torch.autograd.grad(x, scores)[0] for x in (found, torch.stack(wanted).sum()))
    torch.testing.assert_close(ours, theirs)


def test_one_row_is_drawn_in_each_stretch():
    rows = sampled_rows(100, 7, 3)
    edges = torch.arange(8) * 100 // 7
    assert ((rows >= edges[:-1]) & (rows < edges[1:])).all()
    assert not torch.equal(rows, sampled_rows(100, 7, 4))
    assert torch.equal(sampled_rows(3, 7, 0), torch.arange(3))


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_loss_takes_few_operations_and_waits_for_no_number():
    """A GPU's host spends some 20 us on each, of which a step has as many again a layer."""
    model = BlockSparseAdaptive(None, None, 2, 8, density=0.3, block_size=8, causal=True)
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    model(q, k, v)  # what is kept with the geometry is made
    found = []
    layout, _, choice, _ = model.source.select(q, k)
    mass = torch.rand(layout.nnz_blocks)
    with _Operations() as counted:
        found.append(choice.divergence(mass, 1.0)[0])
        found.append(rows_divergence(choice.u, choice.w, q, k, 0.3, model.source.rules, sampled_rows(8, 4, 0), 1.0))
    assert all(x.isfinite() for x in found)
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "unique_dim", "index"}
    assert not waits & set(counted.names)
    assert len(counted.names) < 160, counted.names
