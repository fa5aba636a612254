"""The best columns of each row, ties included."""

import torch

from raybsa.selectors.topk import top_columns


def test_it_is_a_stable_descending_sort():
    scores = torch.randn(5, 7, 200).round(decimals=1)
    scores[0, 0] = 0.0
    scores[0, 1, ::3] = -torch.inf
    scores[0, 2, ::2] *= 1e38
    wanted = scores.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(top_columns(scores, 200), wanted)
    assert torch.equal(top_columns(scores, 9), wanted[..., :9])


def test_equal_scores_go_to_the_lower_column_and_zeros_of_both_signs_are_equal():
    scores = torch.tensor([[-0.0, 0.0, 1.0, -0.0, 1.0, -1e-45]])
    assert top_columns(scores, 6).tolist() == [[2, 4, 0, 1, 3, 5]]


def test_scores_of_16_bits_are_compared_as_they_are():
    scores = torch.tensor([[1.0, 1.0078125, 1.0]], dtype=torch.bfloat16)
    assert top_columns(scores, 3).tolist() == [[1, 0, 2]]
