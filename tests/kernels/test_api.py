"""What block_sparse_attention says to bad arguments, and which backend serves a call."""

from typing import Any

import pytest
import torch

from raybsa import BlockLayout, block_sparse_attention
from tests.kernels.problems import Problem

PROBLEM = Problem("api", kv_heads=2)


def attend(**changes: Any) -> Any:
    q, k, v = PROBLEM.inputs(torch.float32)
    arguments = {"q": q, "k": k, "v": v, "layout": PROBLEM.layout()} | changes
    return block_sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, r"q must be a tensor \(batch, heads, tokens, head_dim\), got list"),
        ({"q": torch.zeros(2, 128, 16)}, TypeError, r"q must be a tensor .* got \(2, 128, 16\)"),
        ({"q": torch.zeros(2, 4, 128, 16, dtype=torch.int64)}, TypeError, "q must be one of .* got torch.int64"),
        ({"v": torch.zeros(2, 2, 128, 16, dtype=torch.float64)}, ValueError, "must share dtype and device"),
        ({"k": torch.zeros(2, 2, 128, 8)}, ValueError, r"k must be \(2, kv_heads, kv_tokens, 16\)"),
        ({"q": torch.zeros(2, 3, 128, 16)}, ValueError, "heads must be a multiple of the KV heads"),
        ({"q": torch.zeros(2, 4, 64, 16)}, ValueError, "for 128 query and 128 key tokens, got q with 64"),
        ({"layout": "dense"}, TypeError, "layout must be a BlockLayout, got str"),
        ({"layout": Problem("three", groups=3).layout()}, ValueError, r"must have 1, 4 \(heads\) or 8 .* got 3"),
        ({"attn_mask": torch.zeros(3, 128, 128)}, ValueError, r"broadcast to \(2, 4, 128, 128\), got \(3, 128, 128\)"),
        ({"attn_mask": torch.zeros(128, 128, dtype=torch.int64)}, TypeError, "attn_mask must be bool"),
        (
            {"block_bias": torch.zeros(3)},
            ValueError,
            r"block_bias must be \(\d+,\) on cpu, .* got \(3,\)",
        ),
        ({"segment_ids": (torch.zeros(2, 128), torch.zeros(2, 128))}, ValueError, "pair of int tensors"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
        (
            {"backend": "cuda"},
            ValueError,
            r"unknown backend 'cuda'; there are auto, blocked, cpp, cudnn, fa4, flex, reference, triton, or your own",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_name_what_was_wanted_and_what_came(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attend(**changes)


@pytest.mark.gpu
def test_a_layout_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="the layout is on cuda:0, q on cpu"):
        attend(layout=PROBLEM.layout("cuda"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout_p": 0.1}, "takes no dropout"),
        ({"attn_mask": torch.zeros(128, 128)}, "takes no attn_mask"),
        ({"return_lse": True}, "returns no lse on the CPU"),
        ({"q": torch.zeros(2, 4, 128, 16, requires_grad=True)}, "no backward on the CPU"),
        ({"layout": BlockLayout.from_rows([[0]] * 16, q_len=128, kv_len=128, q_block_size=8)}, "blocks of 16 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flex_says_why_it_cannot_and_who_can(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=f"backend 'flex' cannot serve this call: .*{reason}.*'blocked'"):
        attend(backend="flex", **changes)


def test_flex_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NotImplementedError, match="needs a C\\+\\+ compiler, and there is no 'no-such-compiler'"):
        attend(backend="flex")
