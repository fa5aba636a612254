"""Half the bytes: gradients travel, and are summed, in a 16-bit format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients.codec import LossyCodec, Payload, wide
from raybsa.gradients.state import State
from raybsa.gradients.wire import summed


@dataclass(frozen=True, kw_only=True)
class _Cast(LossyCodec):
    wire_dtype: ClassVar[torch.dtype]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64)

    def encode(self, wanted: Tensor, dtype: torch.dtype, state: State) -> tuple[Tensor, ...]:
        return (wanted.to(self.wire_dtype),)

    def decode(self, payload: Payload) -> Tensor:
        return payload.tensors[0].to(wide(payload.dtype))

    def exchange(self, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator) -> list[Tensor]:
        return summed(self, tensors, states, communicator)


@dataclass(frozen=True, kw_only=True)
class Float16(_Cast):
    """11 bits of precision; what is beyond 65504, or becomes so in the sum, arrives as inf."""

    name: ClassVar[str] = "fp16"
    wire_dtype: ClassVar[torch.dtype] = torch.float16


@dataclass(frozen=True, kw_only=True)
class BFloat16(_Cast):
    """8 bits of precision and float32's range."""

    name: ClassVar[str] = "bf16"
    wire_dtype: ClassVar[torch.dtype] = torch.bfloat16
