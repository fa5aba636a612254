"""Codec: how a gradient becomes what travels, and back. One codec a file; ``catalog`` names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients.state import State


@dataclass(frozen=True)
class Payload:
    """What travels of one tensor (``tensors``), and what every rank knows of it anyway (``shape`` and ``dtype``)."""

    tensors: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """How gradients travel. Frozen data: what changes from step to step is in a ``State`` per tensor.

    A value that is not finite is sent as such: the result holds NaN or inf on every rank, at its element, its block
    (int8) or its matrix (PowerSGD). What error feedback and warm start remember stays finite.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]

    @abstractmethod
    def compress(self, tensor: Tensor, state: State) -> Payload:
        """What is sent of ``tensor`` (any shape), with ``state`` moved on by a step.

        Raises:
            ValueError: a dtype that the codec does not take.
        """

    @abstractmethod
    def decode(self, payload: Payload) -> Tensor:
        """What ``payload`` says, (payload.shape), in the precision of the arithmetic: see ``wide``."""

    @abstractmethod
    def exchange(self, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator) -> list[Tensor]:
        """The sum over all ranks of what each sends of ``tensors``, the same bits on every rank, in ``wide`` dtypes.

        The tensors share a dtype; every rank calls it with the same shapes, in the same order of calls.
        """

    @final
    def extract(self, payload: Payload) -> Tensor:
        """What ``payload`` says, in the shape and dtype of the tensor that was compressed."""
        return self.decode(payload).to(payload.dtype)

    @final
    def nbytes(self, payload: Payload) -> int:
        """Bytes that travel: what the ledger counts for it, times the other ranks (gathered) or a sum's share."""
        return sum(tensor.nbytes for tensor in payload.tensors)

    @final
    def check(self, dtype: torch.dtype) -> None:
        """Raises ValueError where the codec does not take gradients of ``dtype``."""
        if dtype not in self.dtypes:
            takes = ", ".join(short(x) for x in self.dtypes)
            raise ValueError(f"codec {self.name} takes gradients in {takes}, got {short(dtype)}")

    @final
    @property
    def spec(self) -> dict[str, Any]:
        """``{"name": ..., "params": ...}``, JSON values; ``build`` goes back."""
        return {"name": self.name, "params": asdict(self)}


@dataclass(frozen=True, kw_only=True)
class LossyCodec(Codec):
    """A codec that loses something: error feedback (Seide et al. 2014; Karimireddy et al. 1901.09847) sends it later.

    Args:
        error_feedback: keep input minus what was sent, and add it to the next input.
    """

    error_feedback: bool = True

    @abstractmethod
    def encode(self, wanted: Tensor, dtype: torch.dtype, state: State) -> tuple[Tensor, ...]:
        """What travels of ``wanted`` (contiguous, in ``wide(dtype)``), for a tensor of ``dtype``."""

    def compress(self, tensor: Tensor, state: State) -> Payload:
        wanted = self.wanted(tensor, state)
        payload = Payload(self.encode(wanted, tensor.dtype, state), tensor.shape, tensor.dtype)
        if self.error_feedback:
            state.keep(wanted - self.decode(payload))
        state.step += 1
        return payload

    @final
    def wanted(self, tensor: Tensor, state: State) -> Tensor:
        """The tensor and what was not sent before, contiguous, in ``wide(tensor.dtype)``."""
        self.check(tensor.dtype)
        x = tensor.detach().to(wide(tensor.dtype)).contiguous()
        return x if state.residual is None else x + state.residual


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a codec computes and sums in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
