"""Merging rows and delta in one launch each: as torch's operations have them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from raybsa.kernels.merge import merge
from raybsa.kernels.triton_setup import interpreting
from tests.kernels.problems import relative_error

pytest.importorskip("triton")

BATCH, HEADS, TOKENS, HEAD_DIM = 2, 3, 77, 24


@pytest.fixture(autouse=True)
def _only_where_kernels_run(device: str) -> None:
    if device == "cpu" and not interpreting():
        pytest.skip("Triton's interpreter is off where there is a GPU: run this with -m gpu")


def parts(device: str, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A whole and ``count`` rows to merge into it, not contiguous; some saw no key, and are 0."""
    whole, out = (torch.randn(BATCH, n, HEADS, HEAD_DIM, device=device).to(dtype) for n in (TOKENS, count))
    whole_lse, lse = (5 * torch.randn(BATCH, HEADS, n, device=device) for n in (TOKENS, count))
    whole_lse[:, :, ::5], lse[:, :, ::4] = -math.inf, -math.inf
    whole, out = whole.transpose(1, 2), out.transpose(1, 2)
    return whole * (whole_lse > -math.inf)[..., None], whole_lse, out * (lse > -math.inf)[..., None], lse


@pytest.mark.parametrize("before", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("after", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_merged_rows_are_those_of_merge(before: torch.dtype, after: torch.dtype, some: bool, device: str) -> None:
    from raybsa.kernels.triton_rows import merged_rows

    rows = torch.randperm(TOKENS, device=device)[:40].sort().values if some else None
    whole, whole_lse, out, lse = parts(device, 40 if some else TOKENS, before)
    wanted, wanted_lse = whole.double().contiguous(), whole_lse.double()
    at = torch.arange(TOKENS, device=device) if rows is None else rows
    here = merge(wanted[:, :, at], wanted_lse[:, :, at], out.double(), lse.double())
    wanted[:, :, at], wanted_lse[:, :, at] = here
    merged, merged_lse = merged_rows(whole, whole_lse, out, lse, rows, after)
    assert merged.dtype == after
    assert relative_error(merged, wanted) <= (1e-6 if after == torch.float32 else 1e-3)
    torch.testing.assert_close(merged_lse.double(), wanted_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("with_lse", [False, True])
def test_delta_is_the_sum_over_a_row(with_lse: bool, device: str) -> None:
    from raybsa.kernels.triton_rows import fused_delta

    out, grad_lse, grad_out, _ = parts(device, TOKENS, torch.float16)
    grad_lse = grad_lse.nan_to_num(neginf=1.0)
    wanted = (out.double() * grad_out.double()).sum(-1) - (grad_lse.double() if with_lse else 0.0)
    got = fused_delta(out, grad_out, grad_lse if with_lse else None)
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
