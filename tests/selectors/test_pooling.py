"""What a selector sees of q and k."""

import pytest
import torch

from raybsa.selectors.pooling import block_stats, blocks_before, key_features, query_features


@pytest.mark.parametrize("tokens", [3, 8, 32, 37])
def test_statistics_are_those_of_each_blocks_own_tokens(tokens):
    x = torch.randn(2, 3, tokens, 5, dtype=torch.float64)
    stats = block_stats(x, 8)
    assert stats.shape == (2, 3, -(-tokens // 8), 3, 5)
    for block in range(stats.shape[2]):
        own = x[:, :, 8 * block : 8 * (block + 1)]
        wanted = torch.stack([own.mean(2), own.amax(2), own[:, :, 0]], 2)
        torch.testing.assert_close(stats[:, :, block], wanted)


def test_half_precision_is_pooled_in_float32():
    x = (torch.rand(1, 1, 256, 4) + 100).bfloat16()
    stats = block_stats(x, 256)
    assert stats.dtype == torch.float32
    torch.testing.assert_close(stats[0, 0, 0, 0], x.double().mean((0, 1, 2)).float())


def test_query_heads_of_a_kv_head_lie_side_by_side():
    stats = torch.arange(2 * 4 * 3 * 3 * 2.0).view(2, 4, 3, 3, 2)
    features = query_features(stats, None, kv_heads=2)
    assert features.shape == (2, 2, 3, 12)
    torch.testing.assert_close(features[1, 1, 2], torch.cat([stats[1, 2, 2].flatten(), stats[1, 3, 2].flatten()]))
    keys = key_features(stats).unflatten(-1, (4, 2))
    assert torch.equal(keys[:, :, :, :2], stats[:, :, :, :2])
    assert torch.equal(keys[:, :, 1:, 2:], stats[:, :, :-1, :2])
    assert not keys[:, :, 0, 2:].any()


def test_a_causal_query_reads_the_block_before_and_its_own_first_token_alone():
    x = torch.randn(1, 2, 40, 4)
    stats = block_stats(x, 8)
    features = query_features(stats, blocks_before(stats), 2).unflatten(-1, (3, 4))
    torch.testing.assert_close(features[:, :, 1:, :2], stats[:, :, :-1, :2])
    torch.testing.assert_close(features[:, :, :, 2], x[:, :, ::8])
    assert not features[:, :, 0, :2].any()
