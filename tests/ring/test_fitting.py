"""Fitting finds the hardware that made the measurements."""

from __future__ import annotations

import pytest
import torch

from raybsa.ring.cost import Sizes, predict
from raybsa.ring.estimate import estimate
from raybsa.ring.fitting import Timed, fit
from raybsa.ring.hardware import Hardware, Kernel, Link, Pass
from raybsa.ring.rows import rows_of

SIZES = Sizes(1, 4, 2, 64, 4)
TRUE = Hardware(
    "true",
    tuple(
        Kernel(direction, block, rate, 0.4, 2e-4)
        for direction, block, rate in (
            (Pass.FORWARD, 64, 3e10),
            (Pass.FORWARD, 128, 4e10),
            (Pass.BACKWARD, 64, 2e10),
            (Pass.BACKWARD, 128, 3e10),
        )
    ),
    Link(3e-4, 2e9),
)
MESSAGES = [(1 << i, 3e-4 + (1 << i) / 2e9) for i in range(12, 23, 2)]


def measured(noise: float = 0.0) -> list[Timed]:
    calls = []
    for block in (64, 128):
        for tokens, density in ((2048, 0.1), (4096, 0.1), (8192, 0.1), (4096, 0.03), (4096, 0.5)):
            work = estimate(
                rows_of("sliding_window", tokens // block, causal=True, density=density), 1, block_size=block
            )
            told = predict(work, SIZES, TRUE)
            both = (told.forward_s, told.forward_backward_s - told.forward_s)
            for direction, seconds in zip(Pass, both, strict=True):
                calls.append(Timed(work, SIZES, direction, seconds * (1 + noise * float(torch.randn(())))))
    return calls


def test_rows_without_noise_give_the_hardware_back() -> None:
    found = fit("fitted", measured(), MESSAGES)
    assert found.fitted_on == len(measured()) + len(MESSAGES)
    for kernel in TRUE.kernels:
        again = next(k for k in found.kernels if (k.direction, k.block_size) == (kernel.direction, kernel.block_size))
        assert again.rate == pytest.approx(kernel.rate, rel=1e-6)
        assert again.row_blocks == pytest.approx(kernel.row_blocks, rel=1e-4)
        assert again.call_s == pytest.approx(kernel.call_s, rel=1e-4)
    assert found.link.latency_s == pytest.approx(3e-4)
    assert found.link.bytes_per_s == pytest.approx(2e9)


def test_noise_of_five_percent_leaves_predictions_within_ten() -> None:
    torch.manual_seed(0)
    found = fit("fitted", measured(noise=0.05), MESSAGES)
    for world_size in (2, 8):
        work = estimate(rows_of("dense", 128, causal=True), world_size, block_size=64)
        told, true = (predict(work, SIZES, hardware).forward_backward_s for hardware in (found, TRUE))
        assert told == pytest.approx(true, rel=0.1)


def test_no_coefficient_is_negative() -> None:
    shrinking = [(1 << 12, 5e-3), (1 << 16, 4e-3), (1 << 20, 3e-3)]
    found = fit("odd", measured(), shrinking)
    assert found.link.bytes_per_s == float("inf")
    assert 3e-3 < found.link.latency_s < 5e-3


def test_few_rows_are_enough_and_none_is_not() -> None:
    one_each = measured()[:2]
    found = fit("few", one_each, [])
    told = predict(one_each[0].work, SIZES, found)
    assert told.forward_s == pytest.approx(one_each[0].seconds)
    assert found.link.latency_s == 0
    with pytest.raises(ValueError, match="got none of backward"):
        fit("half", one_each[:1], [])
    with pytest.raises(ValueError, match="must be positive"):
        fit("wrong", [one_each[0]._replace(seconds=0.0)], [])
