"""Speed and memory of a model's attention alone, on synthetic q, k, v, beside torch's SDPA on the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raybsa.counter import Stream, normal
from raybsa.spec import TrialSpec
from raybsa.tasks.attention import timed_attention
from raybsa.timing import DeviceLock, Quantiles, forward_backward_call, forward_call, measure_in_turn, peak_bytes


@dataclass(frozen=True)
class Speed:
    """Milliseconds and bytes of the attention calls of all layers, one after another.

    ``forward_backward`` is None, and memory that of the forward alone, where the backend has no backward here.
    """

    forward: Quantiles
    forward_backward: Quantiles | None
    peak_bytes: int


class Stacks(NamedTuple):
    """A model's attention and torch's dense counterpart, both called with ``inputs``."""

    own: Callable[..., Tensor | tuple[Tensor, ...]]
    dense: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class OwnAttention:
    """What is timed where a task has attention calls of its own: the share of blocks they keep, and what makes them."""

    density: float
    stacks: Callable[[], Stacks]


def synthetic_stacks(spec: TrialSpec, device: torch.device) -> Stacks:
    """``num_layers`` attention calls at ``seq_len``, all on the same synthetic q, k, v."""
    inputs = synthetic_qkv(spec, device)
    own, dense = (AttentionStack(spec, dense=dense).to(device, inputs[0].dtype) for dense in (False, True))
    return Stacks(own, dense, inputs)


def measure_beside_dense(
    make: Callable[[], Stacks], device: torch.device, lock: DeviceLock, *, repeats: int = 20, budget_s: float = 2.0
) -> tuple[Speed, Speed]:
    """(own, dense), timed in turn with torch's SDPA on the same inputs.

    Nobody else computes on the device meanwhile. Memory is that of forward and backward beyond the inputs, from a call
    of its own.
    """
    with lock.shared():
        own_stack, dense_stack, inputs = make()
        forwards = [forward_call(stack, inputs) for stack in (own_stack, dense_stack)]
        both = [forward_backward_call(stack, inputs) for stack in (own_stack, dense_stack)]
        trains = _has_backward(both[0])
    with lock.exclusive():
        with _evaluating(own_stack):
            forward_times = measure_in_turn(forwards, device, repeats=repeats, budget_s=budget_s)
        both_times = measure_in_turn(both, device, repeats=repeats, budget_s=budget_s) if trains else [None, None]
    with lock.shared():
        peaks = [peak_bytes(call, device) for call in (both if trains else forwards)]
    own, dense = (Speed(*found) for found in zip(forward_times, both_times, peaks, strict=True))
    return own, dense


@contextmanager
def _evaluating(stack: object) -> Iterator[None]:
    """A module is in evaluation meanwhile: in training a learned pattern computes its loss in every forward."""
    if not isinstance(stack, nn.Module):
        yield
        return
    training = stack.training
    stack.eval()
    try:
        yield
    finally:
        stack.train(training)


def _has_backward(call: Callable[[], object]) -> bool:
    try:
        call()
    except NotImplementedError:  # the backend's own word that it cannot serve this; any other error is the caller's
        return False
    return True


def synthetic_qkv(
    spec: TrialSpec, device: torch.device | str, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q (batch, num_heads, seq_len, head_dim), k and v (batch, num_kv_heads, …): standard normal, equal everywhere.

    ``tokens``: (n,) positions; only these are made, in their order. None: all ``seq_len``.
    """
    positions = torch.arange(spec.seq_len, device=device) if tokens is None else tokens.to(device)
    kv_heads = spec.num_kv_heads or spec.num_heads
    streams = ((Stream.QUERY, spec.num_heads), (Stream.KEY, kv_heads), (Stream.VALUE, kv_heads))
    q, k, v = (_normal(spec, stream, heads, positions) for stream, heads in streams)
    return q, k, v


class AttentionStack(nn.Module):
    """The attention calls of a model without the rest: every layer reads the same q, k, v, and the results add up."""

    def __init__(self, spec: TrialSpec, *, dense: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(timed_attention(spec, i, dense=dense) for i in range(spec.num_layers))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.layers[0](q, k, v)
        for layer in self.layers[1:]:
            out = out + layer(q, k, v)
        return out


def _normal(spec: TrialSpec, stream: Stream, heads: int, positions: Tensor) -> Tensor:
    """Counted by batch, head, position and channel, so that a value does not depend on the other sizes; made a head at
    a time, since the hash takes 64 bits a number."""
    device = positions.device
    batch, channel = (torch.arange(size, device=device) for size in (spec.batch, spec.head_dim))
    shape = (spec.batch, heads, len(positions), spec.head_dim)
    made = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
    for head in torch.arange(heads, device=device):
        made[:, head] = normal(spec.seed, stream, batch[:, None, None], head, positions[:, None], channel)
    return made
