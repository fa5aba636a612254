"""Ranks that were given different things all raise, name them, and none waits for another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from raybsa import patterns
from raybsa.comm import Communicator
from raybsa.gradients.catalog import build
from raybsa.ring.attention import ring_attention
from raybsa.ring.partition import partition_for
from raybsa.ring.plan import RingPlan
from tests.ranks import run_ranks


def plan(density: float = 0.3, world_size: int = 2) -> RingPlan:
    layout = patterns.build("sliding_window").layout(256, q_block_size=16, density=density)
    return RingPlan(layout, partition_for([layout], world_size, strategy="contiguous"))


def messages(change: Callable[[int, dict[str, Any]], None]) -> list[str]:
    """What each of two ranks raises when ``change(rank, arguments)`` has had its way."""

    def work(communicator: Communicator) -> str:
        arguments: dict[str, Any] = {name: torch.randn(1, 2, 128, 8) for name in "qkv"} | {"plan": plan()}
        change(communicator.rank, arguments)
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            ring_attention(communicator=communicator, **arguments)
        return str(raised.value)

    return run_ranks(2, work)


def only_rank_1(**changed: Any) -> Callable[[int, dict[str, Any]], None]:
    return lambda rank, arguments: arguments.update(changed) if rank == 1 else None


def test_another_layout() -> None:
    both = messages(only_rank_1(plan=plan(density=0.5)))
    assert both[0] == both[1]
    assert "ranks disagree on the ring's call: rank 0 has plan " in both[0]


def test_another_dtype() -> None:
    half = {name: torch.randn(1, 2, 128, 8).bfloat16() for name in "qkv"}
    assert all("torch.float32, batch 1" in m and "torch.bfloat16, batch 1" in m for m in messages(only_rank_1(**half)))


def test_one_tensor_of_another_dtype() -> None:
    both = messages(only_rank_1(k=torch.randn(1, 2, 128, 8).double()))
    assert all("q, k and v of rank 1 must share a dtype" in message for message in both)


def test_a_shard_of_another_length() -> None:
    both = messages(only_rank_1(q=torch.randn(1, 2, 120, 8)))
    assert all("rank 1 holds 128 tokens of the plan's partition, got q (1, 2, 120, 8)" in m for m in both)


def test_another_seed() -> None:
    def change(rank: int, arguments: dict[str, Any]) -> None:
        arguments.update(dropout_p=0.1, seed=rank)

    assert all("dropout 0.1 from seed 0" in m and "from seed 1" in m for m in messages(change))


def test_another_codec() -> None:
    both = messages(only_rank_1(gradient_codec=build("int8")))
    assert all("gradients by {'name': 'none'" in m and "gradients by {'name': 'int8'" in m for m in both)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"plan": plan(world_size=4)}, "the plan is for 4 ranks, the communicator has 2"),
        ({"k": torch.randn(1, 1, 128, 8), "v": torch.randn(1, 1, 128, 8)}, "the plan is for 1 query heads a KV head"),
        ({"dropout_p": 0.1}, "dropout_p needs a seed"),
        ({"block_bias": torch.zeros(3)}, r"block_bias of rank [01] must be"),
    ],
)
def test_what_is_wrong_everywhere(changed: dict[str, Any], message: str) -> None:
    assert all(re.search(message, m) for m in messages(lambda rank, arguments: arguments.update(changed)))
