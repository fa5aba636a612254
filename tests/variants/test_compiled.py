"""Variants under torch.compile: a fixed pattern leaves one graph, a learned one ends it; the numbers are eager's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from raybsa import BlockSparseAdaptive, BlockSparseBase, BlockSparseMultihead

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # dynamo's own
]
OPTIONS: dict[str, Any] = {"density": 0.4, "block_size": 16}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()
    counters.clear()


def compiled(module: nn.Module, **options: Any) -> Any:
    return torch.compile(module, backend="aot_eager", **options)


def outcome(module: Any, *inputs: Tensor, **arguments: Any) -> list[Tensor]:
    """The output and the inputs' gradients."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    torch.manual_seed(0)
    out = module(*inputs, **arguments)
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def same(module: nn.Module, *inputs: Tensor, fullgraph: bool = True, **arguments: Any) -> None:
    found = outcome(compiled(module, fullgraph=fullgraph), *inputs, **arguments)
    assert bool(counters["graph_break"]) is not fullgraph
    torch.testing.assert_close(found, outcome(module, *inputs, **arguments))


def heads(length: int = 96, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 4, length, 16, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("backend", ["auto", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fixed_pattern_is_one_graph(backend: str, dtype: torch.dtype) -> None:
    same(BlockSparseBase(pattern="bigbird", causal=True, backend=backend, **OPTIONS), *heads(dtype=dtype))


def test_masks_and_segments_are_part_of_the_graph() -> None:
    module, segments = BlockSparseBase(**OPTIONS), (torch.arange(96) // 50).expand(2, -1)
    same(module, *heads(), attn_mask=torch.randn(96, 96), segment_ids=(segments, segments))


def test_heads_that_share_keys_are_part_of_the_graph() -> None:
    q, k, v = heads()
    same(BlockSparseBase(causal=True, **OPTIONS), q, k[:, :2], v[:, :2])


def test_inputs_of_any_memory_layout_are_part_of_the_graph() -> None:
    same(BlockSparseBase(**OPTIONS), *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads()))


def test_one_graph_serves_every_length() -> None:
    module = BlockSparseBase(causal=True, **OPTIONS)
    found = compiled(module, fullgraph=True, dynamic=True)
    for length in (96, 80, 130):
        inputs = heads(length)
        torch.testing.assert_close(outcome(found, *inputs), outcome(module, *inputs))
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_of_other_patterns_share_a_graph() -> None:
    layers = [BlockSparseBase(causal=True, density=0.1 * n, block_size=16) for n in range(1, 10)]
    inputs = heads()
    for layer in layers:
        torch.testing.assert_close(outcome(compiled(layer, fullgraph=True), *inputs), outcome(layer, *inputs))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_copy_finds_its_own_pattern() -> None:
    module = BlockSparseBase(**OPTIONS)
    other = copy.deepcopy(module)
    assert other.source.written.tensor is not module.source.written.tensor
    del module
    same(other, *heads())


def test_dropout_is_drawn_when_the_graph_runs() -> None:
    module, inputs = BlockSparseBase(dropout=0.5, **OPTIONS), heads()
    found = compiled(module, fullgraph=True)
    first, again = (outcome(found, *inputs) for _ in range(2))  # outcome seeds torch
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(first, outcome(module, *inputs))
    assert not torch.equal(found(*inputs), found(*inputs))


@pytest.mark.parametrize("arguments", [{}, {"key_padding_mask": torch.arange(96).expand(2, -1) > 90}])
def test_a_drop_in_is_one_graph_with_its_projections(arguments: dict[str, Tensor]) -> None:
    module, x = BlockSparseMultihead(32, 4, batch_first=True, **OPTIONS), torch.randn(2, 96, 32)
    same(module, x, x, x, need_weights=False, **arguments)


@pytest.mark.parametrize("extra", [{"add_bias_kv": True}, {"add_zero_attn": True}, {}])
def test_weights_and_extra_keys_end_the_graph(extra: dict[str, bool]) -> None:
    module, x = BlockSparseMultihead(32, 4, batch_first=True, dropout=0.3, **OPTIONS, **extra), torch.randn(2, 96, 32)
    same(module, x, x, x, need_weights=not extra, fullgraph=False)


def test_a_backend_that_is_not_ours_ends_the_graph() -> None:
    same(BlockSparseBase(backend="reference", **OPTIONS), *heads(), fullgraph=False)


def test_a_gradient_of_the_mask_ends_the_graph() -> None:
    module, inputs = BlockSparseBase(**OPTIONS), heads()
    masks = [torch.zeros(96, 96, requires_grad=True) for _ in range(2)]
    for attend, mask in zip((compiled(module), module), masks, strict=True):
        attend(*inputs, attn_mask=mask).square().sum().backward()
    torch.testing.assert_close(masks[0].grad, masks[1].grad)


@pytest.mark.parametrize("method", ["distill", "bias", "compressed"])
def test_a_learned_pattern_ends_the_graph_and_is_not_compiled_again(method: str) -> None:
    module, inputs = BlockSparseAdaptive(None, None, 4, 16, method=method, causal=True, **OPTIONS), heads()
    found = compiled(module)
    for _ in range(3):
        module.source.passes.count = 0  # which rows are distilled
        wanted = outcome(module, *inputs), module.selector_loss().detach()
        module.source.passes.count = 0
        torch.testing.assert_close((outcome(found, *inputs), module.selector_loss().detach()), wanted)
    assert counters["stats"]["unique_graphs"] == 0


def test_a_drop_in_with_a_learned_pattern_compiles_what_is_around_it() -> None:
    module, x = BlockSparseMultihead(32, 4, batch_first=True, pattern="adaptive", **OPTIONS), torch.randn(2, 96, 32)
    found = compiled(module)
    for _ in range(3):
        out = outcome(found, x, x, x, need_weights=False)
        torch.testing.assert_close(out, outcome(module, x, x, x, need_weights=False))
    assert counters["stats"]["unique_graphs"] == 2
