"""A byte an element: blocks share a scale, and rounding is stochastic, so that it is right on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.counter import Stream, hash_u32, uniform
from raybsa.gradients.codec import LossyCodec, Payload, wide
from raybsa.gradients.state import State
from raybsa.gradients.wire import gathered

LEVELS = 127


@dataclass(frozen=True, kw_only=True)
class Int8(LossyCodec):
    """Levels -127 .. 127 times a scale per block; an element is off by less than one scale (Alistarh et al.
    1610.02132, with the block's maximum as its norm).

    Which way an element is rounded is drawn from (seed, tensor, rank, step, position), so a repeated step repeats it.

    Args:
        block_size: elements that share a float32 scale.
        seed: any integer from 0, the same on every rank.
    """

    block_size: int = 256
    seed: int = 0
    name: ClassVar[str] = "int8"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.bfloat16, torch.float16)

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"int8 needs a block_size of at least 1 element, got {self.block_size!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"int8 needs a seed from 0, got {self.seed!r}")

    def encode(self, wanted: Tensor, dtype: torch.dtype, state: State) -> tuple[Tensor, ...]:
        """Scales (num_blocks,) float32 and levels (numel,) int8. A block that is not finite has such a scale."""
        blocks = self._blocks(wanted.reshape(-1))
        scales = blocks.abs().amax(1) * (1.0 / LEVELS)  # a GPU divides by a number so; the bits agree
        noise = self._noise(blocks.numel(), state, wanted.device).view_as(blocks)
        levels = torch.floor(blocks / scales[:, None] + noise).nan_to_num(0.0, 0.0, 0.0).clamp(-LEVELS, LEVELS)
        return scales, levels.to(torch.int8).view(-1)[: wanted.numel()]

    def decode(self, payload: Payload) -> Tensor:
        scales, levels = payload.tensors
        blocks = self._blocks(levels).to(wide(payload.dtype)) * scales[:, None]
        return blocks.view(-1)[: levels.numel()].view(payload.shape)

    def exchange(self, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator) -> list[Tensor]:
        return gathered(self, tensors, states, communicator)

    def _blocks(self, flat: Tensor) -> Tensor:
        """(num_blocks, block_size) of flat (numel,), the last block filled with zeros."""
        return F.pad(flat, (0, -flat.numel() % self.block_size)).view(-1, self.block_size)

    def _noise(self, count: int, state: State, device: torch.device) -> Tensor:
        """(count,) uniform in [0, 1), a sequence of its own for each tensor, rank and step."""
        words = torch.tensor([[state.tensor], [state.rank], [state.step]])
        own_seed = int(hash_u32(self.seed, Stream.ROUNDING, *words))
        return uniform(own_seed, Stream.ROUNDING, torch.arange(count, device=device))
