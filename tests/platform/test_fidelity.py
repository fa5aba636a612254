"""Fidelity: what a pattern keeps of dense attention, the oracle beside it, selectors distilled on captured calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raybsa import BlockSparseAdaptive, BlockSparseBase, patterns
from raybsa.spec import PatternSpec
from raybsa.tasks import fidelity
from raybsa.tasks.capture import Captured, capture, load_calls, save_calls
from raybsa.tasks.distillation import distill
from raybsa.tasks.fidelity import DenseTruth, fidelities
from raybsa.tasks.planted import planted, planted_recall
from raybsa.variants.selector import BlockSelector

SIZES = {"heads": 2, "blocks": 16, "block_size": 4, "head_dim": 24}


def call(causal: bool = True, tokens: int = 100, batch: int = 2) -> Captured:
    q = 2 * torch.randn(batch, 4, tokens, 8, dtype=torch.float64)
    k, v = (torch.randn(batch, 2, tokens, 8, dtype=torch.float64) for _ in range(2))
    return Captured(q, k, v, causal)


# ---- the measure ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_mass_output_recall_and_error_are_those_of_dense_attention(causal):
    given = call(causal)
    truth = DenseTruth(given, 8)
    k, v = (x.repeat_interleave(2, 1) for x in (given.k, given.v))
    scores = given.q @ k.transpose(-1, -2) / 8**0.5
    hidden = torch.ones(100, 100, dtype=torch.bool).triu(1) & causal
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    mass = F.pad(weights, (0, 4, 0, 4)).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).sum((3, 5)).flatten(0, 1)
    torch.testing.assert_close(truth.mass, mass)
    torch.testing.assert_close(truth.out, weights @ v)
    layout = patterns.build("random").layout(100, num_heads=4, q_block_size=8, causal=causal, density=0.3)
    found = truth.judge("random", layout)
    kept = layout.to_dense().repeat(2, 1, 1)
    shares = (mass * kept).sum((1, 2)) / 800 * 8
    assert (found.recall, found.worst_recall) == pytest.approx((float(shares.mean()), float(shares.min())))
    assert found.density == layout.density
    out = BlockSparseBase(pattern="random", density=0.3, block_size=8, causal=causal)(given.q, given.k, given.v)
    assert found.output_error == pytest.approx(float((out - truth.out).norm() / truth.out.norm()))


def test_the_whole_keeps_everything_and_no_layout_of_a_density_beats_the_oracle():
    truth = DenseTruth(call(), 8)
    whole = truth.judge("dense", patterns.build("dense").layout(100, q_block_size=8, causal=True))
    assert (whole.recall, whole.output_error) == pytest.approx((1.0, 0.0), abs=1e-12)
    oracle = truth.judge("oracle", truth.oracle(0.3).validate())
    for name in ("random", "sliding_window", "strided"):
        layout = patterns.build(name).layout(100, num_heads=4, q_block_size=8, causal=True, density=0.3)
        other = truth.judge(name, layout)
        assert other.density == pytest.approx(oracle.density, abs=0.03)
        assert other.recall < oracle.recall


def test_the_table_holds_the_oracle_and_every_pattern_at_every_density():
    specs = [PatternSpec("sliding_window"), PatternSpec("adaptive"), PatternSpec("adaptive", {"method": "mean-pool"})]
    rows = list(fidelities(call(), specs, [0.2, 0.4], 8, steps=2))
    assert [row.name for row in rows] == ["oracle", "sliding_window", "adaptive", "adaptive (mean-pool)"] * 2
    assert rows[0].density == pytest.approx(rows[2].density)


def test_the_command_prints_the_table(tmp_path, monkeypatch, capsys):
    save_calls([call()], tmp_path / "qkv.pt")
    line = f"fidelity {tmp_path / 'qkv.pt'} --pattern bigbird --density 0.2 --block-size 8"
    monkeypatch.setattr("sys.argv", line.split())
    assert fidelity.main() == 0
    shown = capsys.readouterr().out
    assert "call 0: q (2, 4, 100, 8), k (2, 2, 100, 8), causal=True" in shown
    assert [text.split()[0] for text in shown.splitlines()[2:]] == ["oracle", "bigbird"]


# ---- capturing ------------------------------------------------------------------------------------------------------


class Users(nn.Module):
    """A model of somebody else, and one of ours behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(16, 2, batch_first=True)
        self.ours = nn.ModuleList(
            [
                BlockSparseBase(pattern="dense", block_size=8, scale=0.5, causal=True),
                BlockSparseAdaptive(None, None, 2, 8, block_size=8),
            ]
        )

    def forward(self, x):
        x, _ = self.heads(x, x, x, need_weights=False)
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        q = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return self.ours[1](self.ours[0](q, k=q, v=q), q, q)


def test_attention_of_any_module_is_captured_in_order_and_saved(tmp_path):
    model, calls = Users(), []
    with capture(model, calls):
        model(torch.randn(2, 24, 16))
    assert [(tuple(c.q.shape), c.causal, c.scale) for c in calls] == [
        ((2, 2, 24, 8), False, None),
        ((2, 2, 24, 8), True, None),
        ((2, 2, 24, 8), True, 0.5),
        ((2, 2, 24, 8), False, None),
    ]
    assert not any(tensor.requires_grad for c in calls for tensor in (c.q, c.k, c.v))
    model(torch.randn(2, 24, 16))
    assert len(calls) == 4, "nothing is captured outside of the block"
    save_calls(calls, tmp_path / "calls.pt")
    for was, now in zip(calls, load_calls(tmp_path / "calls.pt"), strict=True):
        assert torch.equal(was.q, now.q)
        assert (was.causal, was.scale) == (now.causal, now.scale)


def test_a_file_of_something_else_is_refused(tmp_path):
    flat = dict.fromkeys("qkv", torch.zeros(2))
    for name, content in {"model": {"weight": torch.zeros(1)}, "flat": flat, "many": [flat, 3]}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match="must hold dicts with q, k and v"):
            load_calls(tmp_path / f"{name}.pt")
    for junk in (b"", b"junk\n", b"\x80\x02."):
        (tmp_path / "junk.pt").write_bytes(junk)
        with pytest.raises(ValueError, match=r"must hold dicts with q, k and v .*; torch.load says \w+: "):
            load_calls(tmp_path / "junk.pt")


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("causal", "sharpness"), [(False, 4.0), (True, 1.0)])
def test_distillation_finds_the_planted_block_of_every_head_and_sample(causal, sharpness):
    options = {"density": 0.3, "block_size": 4, "causal": causal, "sharpness": sharpness}
    lesson, _ = planted(0, batch=64, causal=causal, **SIZES)
    test, target = planted(1, batch=3, causal=causal, **SIZES)
    recalls = {}
    for method in ("mean-pool", "distill"):
        selector = BlockSelector(2, 24, method=method, **options)
        recalls[method, 0] = planted_recall(selector.eval().select(test.q, test.k)[0], target)
    losses = distill(selector.train(), lesson, 150, learning_rate=2e-2, batch=8)
    recall = planted_recall(selector.eval().select(test.q, test.k)[0], target)
    assert losses[-1] < 0.5 * losses[0]
    assert recalls["mean-pool", 0].mean() < 0.5
    assert recalls["distill", 0].mean() < 0.5
    assert recall.min() >= 0.95


def test_what_does_not_learn_by_distillation_is_refused():
    with pytest.raises(ValueError, match="got 'bias' and 2 samples"):
        distill(BlockSelector(4, 8, num_kv_heads=2, method="bias"), call(), 1)
