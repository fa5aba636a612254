"""Whatever is public serves many threads, and tasks of asyncio, from one object: each gets the bits that it gets alone.

All threads begin at one time with an object that nothing was asked yet, so layouts, plans and choices of a backend are
made while others ask for them.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from raybsa import (
    BlockLayout,
    BlockSparseAdaptive,
    BlockSparseBase,
    BlockSparseDistributed,
    BlockSparseMultihead,
    block_sparse_attention,
    create_block_sparse_attention,
    create_multihead_block_sparse,
    patterns,
)
from raybsa.cache import LayoutCache
from raybsa.kernels.cpp_build import why_no_compiler
from raybsa.variants.hf import HFAttention
from raybsa.variants.selector import METHODS
from raybsa.variants.source import FixedPattern
from raybsa.variants.swap import swap_attention
from tests.threads import THREADS, in_threads

H, D, BLOCK = 2, 16, 16
LENGTHS = (80, 112, 65)  # each with a layout of its own
PATTERN = {"pattern": "bigbird", "density": 0.5, "block_size": BLOCK}
BACKENDS = ["blocked", "reference", *(["cpp"] if why_no_compiler() is None else [])]
Attend = Callable[[Tensor], Tensor]  # of x (B, S, H * D)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def over_heads(module: nn.Module) -> Attend:
    return lambda x: module(heads(x), heads(x).flip(-1), heads(x).roll(1, 2)).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Projections around torch's attention, as in anyone's model."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(H * D, 3 * H * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(y) for y in self.qkv(x).chunk(3, -1))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + out.transpose(1, 2).flatten(2)


class Multihead(nn.Module):
    def __init__(self, multihead: nn.MultiheadAttention, need_weights: bool = False) -> None:
        super().__init__()
        self.multihead, self.need_weights = multihead, need_weights

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.multihead(x, x, x, need_weights=self.need_weights)
        return out if weights is None else torch.cat([out, weights], -1)


def swapped(attention: dict[str, object]) -> nn.Module:
    model = nn.Sequential(Attention(), Multihead(nn.MultiheadAttention(H * D, H, batch_first=True)), Attention())
    model.eval()
    swap_attention(model, [attention], lambda: model(torch.zeros(1, 3, H * D)))
    return model


def transformers_layer() -> Attend:
    """Two lengths of keys: the rows of a KV cache have layouts of their own."""
    attention, layer = HFAttention([FixedPattern("bigbird", causal=True)], by_layer=False, backend="auto"), nn.Module()
    layer.is_causal = True

    def attend(x: Tensor) -> Tensor:
        q = heads(x)
        return torch.cat([attention(layer, q, q, q)[0], attention(layer, q[:, :, -5:], q, q)[0]], 1).flatten(2)

    return attend


def one_layout() -> Attend:
    """Every call over a layout that all threads share and that nothing was made for yet."""
    rule = patterns.build("random")
    layouts = {n: rule.layout(n, num_heads=H, q_block_size=BLOCK, density=0.5, causal=True) for n in LENGTHS}

    def attend(x: Tensor) -> Tensor:
        outs = [block_sparse_attention(*(heads(x),) * 3, layouts[x.shape[1]], backend=name) for name in BACKENDS]
        return torch.cat(outs, 1).transpose(1, 2).flatten(2)

    return attend


ADAPTIVE = {"variant": "adaptive", "pattern": {"name": "adaptive"}, "density": 0.5, "block_size": BLOCK}
WINDOW = {"variant": "base", "pattern": {"name": "sliding_window", "params": {"window": 16}}, "block_size": BLOCK}
EVERYTHING: dict[str, Callable[[], Attend]] = {
    **{f"base, {name}": lambda name=name: over_heads(BlockSparseBase(**PATTERN, backend=name)) for name in BACKENDS},
    "factory": lambda: over_heads(create_block_sparse_attention(**PATTERN)),
    "distributed": lambda: over_heads(BlockSparseDistributed(**PATTERN)),
    **{
        f"adaptive, {method}": lambda method=method: over_heads(
            BlockSparseAdaptive(num_heads=H, head_dim=D, density=0.5, block_size=BLOCK, method=method).eval()
        )
        for method in METHODS
    },
    "multihead": lambda: Multihead(create_multihead_block_sparse(H * D, H, batch_first=True, **PATTERN)),
    "multihead, weights": lambda: Multihead(BlockSparseMultihead(H * D, H, batch_first=True, **PATTERN), True),
    "multihead, learned": lambda: Multihead(
        BlockSparseMultihead(H * D, H, batch_first=True, pattern="adaptive", density=0.5, block_size=BLOCK)
    ).eval(),
    "swapped": lambda: swapped(WINDOW),
    "swapped, learned": lambda: swapped(ADAPTIVE),
    "transformers": transformers_layer,
    "one layout": one_layout,
}


def inputs(length: int, number: int) -> Tensor:
    """Other numbers for every thread: what one took from another would show."""
    return torch.randn(2, length, H * D, generator=torch.Generator().manual_seed(100 * number + length))


def outputs_and_gradients(attend: Attend, number: int) -> list[Tensor]:
    found = []
    for length in LENGTHS:
        x = inputs(length, number).requires_grad_()
        out = attend(x)
        found += [out.detach(), *torch.autograd.grad(out.square().sum(), x)]
    return found


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def made(name: str) -> Attend:
    torch.manual_seed(0)  # its weights
    return EVERYTHING[name]()


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_thread_gets_the_bits_that_it_gets_alone(name: str) -> None:
    alone, shared = made(name), made(name)
    wanted = [outputs_and_gradients(alone, number) for number in range(THREADS)]
    found = in_threads(lambda number: outputs_and_gradients(shared, number))
    assert all(equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not equal(found[0], found[1]), "each has numbers of its own"


@pytest.mark.parametrize("name", EVERYTHING)
def test_threads_that_serve_without_gradients_get_the_bits_of_one(name: str) -> None:
    alone, shared = made(name), made(name)

    def serve(attend: Attend, number: int) -> list[Tensor]:
        with torch.inference_mode():
            return [attend(inputs(length, number)) for length in LENGTHS * 2]

    wanted = [serve(alone, number) for number in range(THREADS)]
    found = in_threads(lambda number: serve(shared, number))
    assert all(equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", EVERYTHING)
def test_tasks_of_asyncio_that_take_turns_get_the_bits_of_one(name: str) -> None:
    alone, shared = made(name), made(name)
    wanted = [[alone(inputs(length, number)) for length in LENGTHS] for number in range(THREADS)]

    async def serve(number: int) -> list[Tensor]:
        found = []
        for length in LENGTHS:
            x = inputs(length, number)
            found.append(await asyncio.to_thread(shared, x) if number % 2 else shared(x))
            await asyncio.sleep(0)
        return found

    async def all_of_them() -> list[list[Tensor]]:
        return await asyncio.gather(*map(serve, range(THREADS)))

    found = asyncio.run(all_of_them())
    assert all(equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_layout_is_built_once_whoever_asks_first() -> None:
    built: list[int] = []
    cache: LayoutCache[BlockLayout] = LayoutCache()

    def build() -> BlockLayout:
        built.append(1)
        return patterns.build("bigbird").layout(200, q_block_size=BLOCK, density=0.5)

    found = in_threads(lambda number: cache.get("key", build))
    assert len(built) == 1
    assert all(one is found[0] for one in found)


def test_threads_may_copy_what_others_call() -> None:
    model = BlockSparseBase(**PATTERN)
    wanted = over_heads(model)(inputs(80, 0))
    found = in_threads(lambda number: over_heads(copy.deepcopy(model) if number % 2 else model)(inputs(80, 0)))
    assert all(torch.equal(one, wanted) for one in found)
