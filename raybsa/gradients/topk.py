"""The few largest elements, each with its index. Ranks choose different ones, so these are gathered, never summed by
position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients.codec import LossyCodec, Payload, wide
from raybsa.gradients.state import State
from raybsa.gradients.wire import gathered


@dataclass(frozen=True, kw_only=True)
class TopK(LossyCodec):
    """Sends exactly ``max(1, round(density * numel))`` elements, the largest by magnitude, of equal ones the first
    (Lin et al. 1712.01887 and Stich et al. 1809.07599, without momentum correction). What is not finite is largest.

    Args:
        density: share of a tensor's elements that is sent, in (0, 1].
    """

    density: float = 0.01
    name: ClassVar[str] = "topk"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def __post_init__(self) -> None:
        if not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise ValueError(f"topk needs a density in (0, 1], got {self.density!r}")

    def count(self, numel: int) -> int:
        """Elements that are sent of ``numel``."""
        return min(numel, max(1, round(self.density * numel)))

    def encode(self, wanted: Tensor, dtype: torch.dtype, state: State) -> tuple[Tensor, ...]:
        """Values (k,) in ``dtype`` and indices (k,) int32, ascending."""
        flat = wanted.reshape(-1)
        if flat.numel() > torch.iinfo(torch.int32).max:
            raise ValueError(f"topk takes tensors of fewer than 2**31 elements, got {flat.numel()}")
        index = largest(flat, self.count(flat.numel()))
        return flat[index].to(dtype), index.to(torch.int32)

    def decode(self, payload: Payload) -> Tensor:
        values, index = payload.tensors
        flat = torch.zeros(payload.shape.numel(), dtype=wide(payload.dtype), device=values.device)
        flat[index.long()] = values.to(flat.dtype)
        return flat.view(payload.shape)

    def exchange(self, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator) -> list[Tensor]:
        return gathered(self, tensors, states, communicator)


def largest(flat: Tensor, count: int) -> Tensor:
    """Indices (count,) int64, ascending, of the largest magnitudes of flat (numel,); of equal ones the first."""
    if not count:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    size = flat.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    least = size.topk(count, sorted=False).values.min()
    above, equal = (size > least).nonzero().view(-1), (size == least).nonzero().view(-1)
    return torch.cat([above, equal[: count - above.numel()]]).sort().values
