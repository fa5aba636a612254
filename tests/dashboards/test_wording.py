"""How numbers and specs read, and that what is offered to paste is what was measured."""

from __future__ import annotations

import ast

import pytest
import torch

from dashboards.wording import (
    milliseconds,
    moment,
    number,
    paste,
    pattern_label,
    percent,
    quality,
    size,
    times,
    trial_label,
)
from raybsa import create_block_sparse_attention
from raybsa.patterns import build
from raybsa.spec import AttentionSpec, PatternSpec, Ranks, TrialSpec
from tests.dashboards.made import DENSE, sparse


def test_numbers_have_three_digits_and_unmeasured_is_a_dash() -> None:
    assert [number(x) for x in (0.012345, 2.2149, 999.6, 12345.0, 3e-7)] == [
        "0.0123",
        "2.21",
        "1,000",
        "12,300",
        "3e-07",
    ]
    assert [f(None) for f in (number, milliseconds, size, percent, times, quality)] == ["–"] * 6
    assert [quality(x) for x in (3.2, 3.2014, 0.9971, 1.0, 12.34567, 1234.0)] == [
        "3.200",
        "3.201",
        "0.9971",
        "1.000",
        "12.35",
        "1234",
    ]


def test_numbers_carry_their_unit() -> None:
    texts = [milliseconds(3.14159), size(1536), size(3 << 20), size(5 << 30), size(12), percent(0.125), times(2.5)]
    assert [t.replace("\u00a0", " ") for t in texts] == [
        "3.14 ms",
        "1.5 KiB",
        "3 MiB",
        "5 GiB",
        "12 B",
        "12.5 %",
        "2.5×",
    ]


def test_times_are_shown_to_the_minute() -> None:
    assert moment("2026-03-01T10:05:59+00:00") == "2026-03-01 10:05 UTC"
    assert moment("yesterday") == "yesterday"


def test_a_composed_pattern_is_named_by_its_parts() -> None:
    parts = [{"name": "sink_window", "params": {}}, {"name": "random", "params": {"seed": 7}}]
    assert pattern_label(PatternSpec("union", {"parts": parts})) == "sink_window | random(seed=7)"
    assert pattern_label(PatternSpec("per_head", {"parts": parts})) == "per_head[sink_window, random(seed=7)]"


@pytest.mark.parametrize("attention", [sparse("bigbird", 0.5), sparse("random", None, seed=7)], ids=["density", "own"])
def test_the_pasted_text_makes_the_attention_that_was_measured(attention: AttentionSpec) -> None:
    module = eval(
        paste(TrialSpec("byte_lm", (attention,))), {"create_block_sparse_attention": create_block_sparse_attention}
    )
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 512, 16).unbind(0)
    layout = build(attention.pattern).layout(512, num_heads=4, causal=True, density=attention.density)
    mask = layout.to_dense().repeat_interleave(64, 1).repeat_interleave(64, 2) & torch.ones(512, 512).tril().bool()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
    torch.testing.assert_close(module(q, k, v), wanted, rtol=1e-4, atol=1e-5)


def test_layers_that_differ_are_named_in_turn_and_those_alike_once() -> None:
    layers = (DENSE, sparse("bigbird"), sparse("bigbird"), DENSE)
    spec = TrialSpec("byte_lm", layers, num_layers=4)
    assert trial_label(spec).replace("\u00a0", " ") == "dense / 2× bigbird · 10 % / dense"
    assert trial_label(TrialSpec("byte_lm", layers[:1])) == "dense"
    ring = spec.over(Ranks(2, "zigzag"))
    assert trial_label(ring).replace("\u00a0", " ") == "dense / 2× bigbird · 10 % / dense · 2 ranks, zigzag"


def test_layers_that_differ_are_pasted_as_a_list() -> None:
    text = paste(TrialSpec("byte_lm", (sparse("bigbird", 0.1), DENSE)))
    modules = eval(text, {"create_block_sparse_attention": lambda **arguments: arguments})
    assert [layer["pattern"]["name"] for layer in modules] == ["bigbird", "dense"]
    assert all(layer["causal"] for layer in modules)


def test_a_pattern_name_cannot_break_out_of_the_pasted_text() -> None:
    name = "x'}); __import__('os').abort() #\n"
    call = ast.parse(paste(TrialSpec("byte_lm", (sparse(name),))), mode="eval").body
    assert isinstance(call, ast.Call)
    assert ast.literal_eval(call.keywords[0].value)["pattern"]["name"] == name
