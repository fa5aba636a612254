"""Memory: O(kept blocks), and nothing of the size of blocks x blocks. (Times are in jobs/benchmark.py.)"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raybsa import patterns
from raybsa.patterns.catalog import CATALOG
from raybsa.patterns.permutation import permuted

FAMILIES = [name for name in CATALOG if name not in ("blocks", "union", "per_head")]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))]
        )
        return result


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_largest_tensor_is_in_proportion_to_the_blocks_kept(name, causal):
    length = 1 << 18  # 4096 x 4096 blocks
    for density in (None, 0.004):
        if density is None and name in ("dense", "strided", "fixed"):
            continue  # these keep a share of all blocks by themselves
        with LargestTensor() as largest:
            made = patterns.build(name).layout(length, num_heads=2, causal=causal, density=density)
        assert largest.numel <= 8 * made.nnz_blocks + 8 * made.num_q_blocks
        assert largest.numel < made.num_q_blocks * made.num_kv_blocks / 4


def test_a_million_tokens_are_laid_out_without_a_square_of_blocks():
    with LargestTensor() as largest:
        made = patterns.build("bigbird").layout(1 << 20, num_heads=2, causal=True)
    assert made.num_q_blocks == 16384
    assert largest.numel < 16384 * 40


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_a_permutation_hits_every_value_once(size):
    value = torch.arange(size).repeat(5)
    row = torch.arange(5).repeat_interleave(size)
    image = permuted(value, row, torch.full((5,), size), torch.arange(5) * 12345)
    for row_image in image.view(5, size):
        assert sorted(row_image.tolist()) == list(range(size))


def test_a_permutations_first_choices_are_uniform_and_independent():
    rows, size = 20_000, 16
    first, second = (
        permuted(torch.full((rows,), rank), torch.arange(rows), torch.full((rows,), size), torch.arange(rows) * 77)
        for rank in (0, 1)
    )
    counts = torch.bincount(first * size + second, minlength=size * size).view(size, size).double()
    assert counts.diagonal().sum() == 0
    expected = rows / (size * (size - 1))
    off = counts[~torch.eye(size, dtype=torch.bool)]
    chi_square = float(((off - expected) ** 2 / expected).sum())  # 239 degrees of freedom: mean 239, deviation 22
    assert chi_square < 239 + 5 * 22
