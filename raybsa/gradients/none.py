"""No compression: the tensor itself is summed, in its own dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients.codec import Codec, Payload
from raybsa.gradients.state import State
from raybsa.gradients.wire import summed


@dataclass(frozen=True, kw_only=True)
class Uncompressed(Codec):
    """Sends the tensor as it is; nothing is lost but a sum's own rounding."""

    name: ClassVar[str] = "none"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def compress(self, tensor: Tensor, state: State) -> Payload:
        self.check(tensor.dtype)
        state.step += 1
        return Payload((tensor.detach().contiguous(),), tensor.shape, tensor.dtype)

    def decode(self, payload: Payload) -> Tensor:
        return payload.tensors[0]

    def exchange(self, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator) -> list[Tensor]:
        return summed(self, tensors, states, communicator)
