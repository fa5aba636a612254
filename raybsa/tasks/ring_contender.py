"""Contender: one way to attend over ranks, ours or another library's, and what every one of them is measured by."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raybsa import patterns
from raybsa.comm import Communicator
from raybsa.kernels.api import block_sparse_attention
from raybsa.layout import BlockLayout
from raybsa.ring.timeline import Span
from raybsa.spec import TrialSpec
from raybsa.tasks.ring_rounds import from_all
from raybsa.tasks.speed import synthetic_qkv
from raybsa.timing import device_name, forward_backward_call, forward_call

SMALL_TOKENS = 1024  # a rank's, where all of a contender is compared with the reference
SMALL_DENSITY = 0.3  # at least, so that more than the diagonal is left of so few blocks
SMALL_KV_HEADS = 2


class Contender(NamedTuple):
    """What one rank holds and calls.

    Args:
        tokens: (n,) int64, the global positions of its tokens, in the order in which it holds them.
        over_ranks: its q (B, H, n, D), k and v (B, Hkv, n, D) -> its rows (B, H, n, D).
        alone: the same kernel on the whole sequence in one process; None where that is not asked for.
    """

    tokens: Tensor
    over_ranks: Callable[[Tensor, Tensor, Tensor], Any]
    alone: Callable[[Tensor, Tensor, Tensor], Any] | None = None


@dataclass
class RankReport:
    """What one rank saw, and where. Milliseconds by step and round, rank 0's alone for ``single_*``."""

    rank: int
    host: str
    device_name: str
    num_threads: int
    times_ms: dict[str, list[float]] = field(default_factory=dict)
    forward_bytes: int = 0
    forward_backward_bytes: int = 0
    peak_bytes: int = 0
    errors: tuple[float, float] | None = None
    spans: list[Span] = field(default_factory=list)
    begun_s: float = 0.0


def report_of(communicator: Communicator) -> RankReport:
    """A rank's report with nothing measured yet."""
    return RankReport(
        communicator.rank, socket.gethostname(), device_name(communicator.device), torch.get_num_threads()
    )


def ring_layout(spec: TrialSpec, device: torch.device | str = "cpu") -> BlockLayout:
    """The layout of the whole sequence; as for the attention modules, the family's smallest where that is more than the
    density."""
    attention = spec.layer(0)
    assert attention.pattern is not None
    return patterns.build(attention.pattern).layout(
        spec.seq_len,
        num_heads=spec.num_heads,
        q_block_size=attention.block_size,
        causal=spec.causal,
        density=attention.density,
        device=device,
        or_least=True,
    )


def calls_of(contender: Contender, spec: TrialSpec, communicator: Communicator) -> dict[str, Callable[[], Any]]:
    """This rank's steps by name; rank 0 has those of the single process too."""
    mine = synthetic_qkv(spec, communicator.device, contender.tokens)
    calls: dict[str, Callable[[], Any]] = {
        "forward": forward_call(contender.over_ranks, mine),
        "forward_backward": forward_backward_call(contender.over_ranks, mine),
    }
    if contender.alone is not None and communicator.rank == 0:
        whole = synthetic_qkv(spec, communicator.device)
        calls["single_forward"] = forward_call(contender.alone, whole)
        calls["single_forward_backward"] = forward_backward_call(contender.alone, whole)
    return calls


def small_of(spec: TrialSpec, world_size: int) -> TrialSpec:
    """The same question with few tokens and heads, and enough blocks for every rank."""
    attention, queries_per_kv = spec.layer(0), spec.num_heads // (spec.num_kv_heads or spec.num_heads)
    if attention.density is not None:
        attention = replace(attention, density=max(SMALL_DENSITY, attention.density))
    return replace(
        spec,
        attention=(attention,),
        seq_len=min(spec.seq_len, max(SMALL_TOKENS, 4 * attention.block_size) * world_size),
        num_heads=SMALL_KV_HEADS * queries_per_kv,
        num_kv_heads=SMALL_KV_HEADS,
    )


def reference_errors(contender: Contender, spec: TrialSpec, communicator: Communicator) -> tuple[float, float]:
    """(forward, gradient) of the worst rank's tokens against the reference in float32: dense, so for ``small_of``."""
    found = calls_of(contender._replace(alone=None), spec, communicator)
    layout = ring_layout(spec, communicator.device)
    exact = tuple(x.float() for x in synthetic_qkv(spec, communicator.device))

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return block_sparse_attention(q, k, v, layout, backend="reference")

    errors = errors_of(
        found,
        {
            "single_forward": forward_call(reference, exact),
            "single_forward_backward": forward_backward_call(reference, exact),
        },
        contender.tokens,
    )
    forward, gradient = (max(from_all(error, communicator)) for error in errors)
    return forward, gradient


def errors_of(
    over_ranks: Mapping[str, Callable[[], Any]], single: Mapping[str, Callable[[], Any]], tokens: Tensor
) -> tuple[float, float]:
    """(forward, gradient) of a rank's ``tokens`` against one process with the whole sequence."""

    def mine(whole: Tensor) -> Tensor:
        return whole.index_select(2, tokens.to(whole.device))

    forward = relative_error(over_ranks["forward"](), mine(single["single_forward"]()))
    wanted = [mine(x) for x in single["single_forward_backward"]()]
    return forward, max(map(relative_error, over_ranks["forward_backward"](), wanted))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Max abs difference / max abs reference."""
    largest = float(wanted.double().abs().max())
    return float((found.double() - wanted.double()).abs().max()) / (largest or 1.0)
