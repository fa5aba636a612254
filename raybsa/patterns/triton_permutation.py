"""``permuted`` on a GPU: all rounds of a value in one program, not twenty operations a round over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from raybsa.counter import Stream
from raybsa.kernels.triton_scores import mix

LAYOUT = tl.constexpr(int(Stream.LAYOUT))
VALUES = 512  # a program


def permuted_by_triton(value: Tensor, row: Tensor, size: Tensor, key: Tensor, rounds: int) -> Tensor:
    """As ``permuted``, whose numbers these are to the bit; sizes are below 2**31."""
    image = torch.empty_like(value)
    grid = (triton.cdiv(len(value), VALUES),)
    if len(value):
        permuted_kernel[grid](value, row, size, key, image, len(value), rounds, VALUES)
    return image


@triton.jit(do_not_specialize=["count", "rounds"])
def permuted_kernel(value, row, size, key, image, count, rounds, VALUES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    inside = at < count
    its_row = tl.load(row + at, mask=inside, other=0)
    here = tl.load(value + at, mask=inside, other=0).to(tl.uint32)
    many = tl.load(size + its_row, mask=inside, other=1).to(tl.uint32)
    own_key = tl.load(key + its_row, mask=inside, other=0).to(tl.uint32)
    for turn in tl.range(0, rounds):
        begin = mix(mix((tl.zeros_like(own_key) + turn).to(tl.uint32)) ^ LAYOUT)  # hash_u32(turn, LAYOUT, ...)'s
        turn_key = mix(begin ^ own_key)
        pivot = turn_key % many
        other = tl.where(pivot >= here, pivot - here, pivot + many - here)
        coin = mix(begin ^ (turn_key ^ tl.maximum(here, other))) & 1
        here = tl.where(coin == 1, other, here)
    tl.store(image + at, here.to(tl.int64), mask=inside)
