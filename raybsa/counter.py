"""The counter-based hash behind all randomness that must agree between devices, ranks and backends.

``hash_u32(seed, what, *counters)`` chains the 32-bit finaliser *lowbias32* (C. Wellons, "Prospecting for Hash
Functions", 2018): ``h = mix(h ^ word)`` over the words ``seed, what, counter 0, counter 1, ...``, starting from 0. It
is a function of its arguments alone, so that a layout, a dropout mask or a synthetic tensor is the same on a CPU, on a
GPU, on one rank or on many. Not for cryptography.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Stream(IntEnum):
    """What a random number is for: streams never share numbers."""

    LAYOUT = 1
    DROPOUT = 2
    QUERY = 3
    KEY = 4
    VALUE = 5
    TASK = 6
    ROUNDING = 7
    FACTOR = 8


def hash_u32(seed: int | Tensor, stream: Stream, *counters: Tensor) -> Tensor:
    """Uniform 32-bit numbers as int64 in 0 .. 2**32 - 1, of the broadcast shape of ``counters``.

    ``counters`` are one or more integer tensors on one device, where the numbers are made. Of ``seed``, a number or ()
    int64 on that device, the lower 32 bits count.
    """
    first, *others = counters
    state = _mix(mix_words(seed, int(stream)) ^ (first.long() & 0xFFFFFFFF))
    for counter in others:
        state = _mix(state ^ (counter.long() & 0xFFFFFFFF))
    return state


def mix_words(first: int | Tensor, *words: int) -> Any:
    """The state of the hash after these words, a number or a tensor as the first is: what a kernel that goes on with
    counters of its own starts from."""
    state = _mix(first & 0xFFFFFFFF)
    for word in words:
        state = _mix(state ^ (word & 0xFFFFFFFF))
    return state


def uniform(seed: int | Tensor, stream: Stream, *counters: Tensor) -> Tensor:
    """Uniform float32 in [0, 1): the upper 24 bits of ``hash_u32``."""
    return (hash_u32(seed, stream, *counters) >> 8).to(torch.float32) * 2.0**-24


def normal(seed: int | Tensor, stream: Stream, *counters: Tensor) -> Tensor:
    """Standard normal float32 by Box and Muller (1958) from two numbers of each counter."""
    zero = torch.zeros((), dtype=torch.int64, device=counters[0].device)
    first, second = uniform(seed, stream, *counters, zero), uniform(seed, stream, *counters, zero + 1)
    return torch.sqrt(-2.0 * torch.log1p(-first)) * torch.cos(2.0 * math.pi * second)


def _mix(x: Any) -> Any:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
