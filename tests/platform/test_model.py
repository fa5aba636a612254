"""The tasks' transformer: causal, the same everywhere, at home at any length."""

from dataclasses import replace

import pytest
import torch

from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.attention import DenseAttention
from raybsa.tasks.model import Transformer, rotary, rotate

DENSE = AttentionSpec("dense")
WINDOW = AttentionSpec("base", PatternSpec("sliding_window", {"window": 16}), block_size=16)
SPEC = TrialSpec("byte_lm", (DENSE,), num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.mark.parametrize("attention", [(DENSE,), (WINDOW,), (DENSE, WINDOW)], ids=["dense", "window", "mixed"])
def test_a_later_token_never_changes_an_earlier_output(attention):
    model = Transformer(replace(SPEC, attention=attention), 32)
    tokens = torch.randint(32, (2, 80))
    changed = tokens.clone()
    changed[:, 50:] = 31 - changed[:, 50:]
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :50], before[:, :50])
    assert not torch.allclose(after[:, 50], before[:, 50])


def test_a_window_hides_what_lies_beyond_it():
    """Two layers of one block each way and the shifted key see at most 2 * (16 + 16) + 2 tokens back."""
    model = Transformer(replace(SPEC, attention=(WINDOW,)), 32)
    tokens = torch.randint(32, (1, 160))
    changed = tokens.clone()
    changed[:, :32] = 31 - changed[:, :32]
    torch.testing.assert_close(model(changed)[:, 112:], model(tokens)[:, 112:])
    dense = Transformer(SPEC, 32)
    assert not torch.allclose(dense(changed)[:, 112:], dense(tokens)[:, 112:])


def test_equal_seeds_give_equal_models_and_others_do_not():
    torch.rand(3)
    one = Transformer(SPEC, 32)
    torch.rand(5)
    same, other = Transformer(SPEC, 32), Transformer(replace(SPEC, seed=1), 32)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


def test_a_layer_attends_as_the_formula_says():
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    wanted = scores.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(DenseAttention(causal=True)(q, k, v), wanted)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(8), torch.randn(8)
    rotation = rotary(torch.arange(40), 8, q)
    turned_q, turned_k = (rotate(x.expand(1, 1, 40, 8), rotation)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores.diagonal(-7), scores[7, 0].expand(33))
    assert not torch.allclose(scores[8, 0], scores[7, 0])
