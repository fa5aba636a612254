"""Attention over parts of the blocks, as a ring makes it: parts of the queries, and for each the keys in parts, merged;
the gradients by ``attention_backward`` of every part beside those of autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raybsa import BlockLayout, block_sparse_attention
from raybsa.kernels.api import make_call
from raybsa.kernels.backward import BACKENDS, attention_backward
from raybsa.kernels.merge import merge
from tests.fuzzing.given import Results
from tests.fuzzing.inputs import gradient_for
from tests.fuzzing.problem import Problem


class Part(NamedTuple):
    """Some query blocks and some KV blocks: their layout, their tokens, and the places of the kept blocks."""

    layout: BlockLayout
    rows: Tensor
    columns: Tensor
    index: Tensor

    def of(self, given: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
        """q, k and v, and the masks, of the part."""
        xs = [given["q"].index_select(2, self.rows), *(given[n].index_select(2, self.columns) for n in "kv")]
        options: dict[str, Any] = {}
        if "sq" in given:
            ids = given["sq"].index_select(1, self.rows), given["sk"].index_select(1, self.columns)
            options["segment_ids"] = ids
        if "b" in given:
            options["block_bias"] = given["b"].index_select(0, self.index)
        return xs, options


class Parts(Problem):
    """The call over parts of the blocks."""

    def call(self, *xs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, xs, strict=True))
        of_rows = [self._attend(given, parts) for parts in self._grid()]
        order = torch.argsort(torch.cat([parts[0].rows for parts in self._grid()]))
        return tuple(torch.cat(x, 2).index_select(2, order) for x in zip(*of_rows, strict=True))

    def _attend(self, given: dict[str, Tensor], parts: list[Part]) -> tuple[Tensor, Tensor]:
        found = []
        for part in parts:
            xs, options = part.of(given)
            found.append(block_sparse_attention(*xs, part.layout, **options, **self.options))
        out, lse = found[0]
        for other in found[1:]:
            out, lse = merge(out, lse, *other)
        return out, lse

    def _grid(self) -> Iterator[list[Part]]:
        """For each hand of query blocks, the parts by hands of KV blocks."""
        layout, seed, device = self.layout, self.case.seed, self.case.device
        for q_ids in _deal(layout.num_q_blocks, seed):
            parts = []
            for kv_ids in _deal(layout.num_kv_blocks, seed + 1):
                part, index = layout.select(q_ids.to(device), kv_ids.to(device), return_index=True)
                rows = _tokens(q_ids, layout.q_block_size, layout.q_len).to(device)
                columns = _tokens(kv_ids, layout.kv_block_size, layout.kv_len).to(device)
                parts.append(Part(part, rows, columns, index))
            yield parts

    def beside(self, wanted: Results) -> Results:
        """Gradients of q, k, v and b, summed over the parts by ``attention_backward``."""
        given, wide = dict(zip(self.names, self.tensors, strict=True)), self.wide
        out, lse = wanted["out"].to(self.tensors[0].dtype), wanted["lse"].to(wide)
        grad_out, grad_lse = gradient_for(out, 0), gradient_for(lse, 1)
        delta = (wanted["out"] * grad_out.double()).sum(-1) - grad_lse.masked_fill(lse == float("-inf"), 0.0)
        sums = {name: torch.zeros_like(given[name], dtype=wide) for name in "qkvb" if name in given}
        backend = self.case.backend if self.case.backend in BACKENDS else "auto"
        numbers = {name: x for name, x in self.options.items() if name != "backend"}
        for part in (part for parts in self._grid() for part in parts):
            xs, options = part.of(given)
            of_rows = [x.index_select(2, part.rows) for x in (lse, delta.to(wide), grad_out)]
            found = attention_backward(make_call(*xs, part.layout, **options, **numbers), *of_rows, backend=backend)
            places = {"q": (2, part.rows), "k": (2, part.columns), "v": (2, part.columns), "b": (0, part.index)}
            for name, x in zip("qkvb", found, strict=True):
                if name in sums:
                    assert x is not None
                    sums[name].index_add_(*places[name], x)
        return {f"grad {name}": x for name, x in sums.items() if name in self.case.grad_of}

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.tensors[0].dtype == torch.float64 else torch.float32


def _tokens(ids: Tensor, size: int, length: int) -> Tensor:
    every = (ids[:, None] * size + torch.arange(size)).flatten()
    return every[every < length]


def _deal(blocks: int, seed: int) -> list[Tensor]:
    """The blocks' numbers in one to three hands, none empty."""
    generator = torch.Generator().manual_seed(seed)
    hands = int(torch.randint(1, 4, (), generator=generator))
    whose = torch.randint(0, hands, (blocks,), generator=generator)
    found = [(whose == hand).nonzero().flatten() for hand in range(hands)]
    return [ids for ids in found if len(ids)]
