"""The permutation on a GPU has the numbers of the one in torch's operations, to the bit."""

from __future__ import annotations

import pytest
import torch

from raybsa import patterns
from raybsa.kernels.triton_setup import interpreting, repair_interpreter
from raybsa.patterns import permutation

pytest.importorskip("triton")


def test_both_permutations_have_the_same_numbers(device: str) -> None:
    if device == "cpu" and not interpreting():
        pytest.skip("Triton's interpreter is off where there is a GPU: run this with -m gpu")
    repair_interpreter()
    from raybsa.patterns.triton_permutation import permuted_by_triton

    rows, count = 37, 3000
    size = torch.randint(1, 3000, (rows,))
    size[0], size[1] = 1, 2**31 - 1
    key, row = torch.randint(0, 2**32, (rows,)), torch.randint(0, rows, (count,))
    value = (torch.rand(count, dtype=torch.float64) * size[row]).long()
    wanted = permutation.permuted(value, row, size, key)
    got = permuted_by_triton(*(x.to(device) for x in (value, row, size, key)), permutation._ROUNDS)
    assert torch.equal(got.cpu(), wanted)
    assert not torch.equal(wanted, value)


@pytest.mark.gpu
def test_a_random_layout_is_the_same_on_a_gpu() -> None:
    rule = patterns.build("random")
    made = [rule.layout(8192, num_heads=4, density=0.1, causal=True, device=device) for device in ("cpu", "cuda")]
    assert made[0].digest() == made[1].digest()
