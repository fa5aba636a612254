"""PowerSGD: a matrix travels as two thin factors, found by one step of subspace iteration that ranks take together
(Vogels, Karimireddy, Jaggi, 1905.13727; algorithm 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.counter import Stream, normal
from raybsa.gradients.codec import LossyCodec, Payload, wide
from raybsa.gradients.factor_wire import FactorWire, FloatWire, Int8Wire
from raybsa.gradients.orthonormal import orthonormal
from raybsa.gradients.state import State

START = "start"
WIRES = (None, "bfloat16", "int8")


class _Factors(NamedTuple):
    """A tensor's sums of the two rounds (one where it is sent as it is), and what they say."""

    sent: tuple[Tensor, ...]
    total: Tensor


@dataclass(frozen=True, kw_only=True)
class PowerSGD(LossyCodec):
    """A tensor (n, ...) is seen as a matrix M (n, m) and sent as P (n, rank) and Q (m, rank): P = M start, summed over
    ranks and made orthonormal; Q = M^T P, summed; P Q^T is the result, and Q the next step's start.

    Vectors, and matrices for which that saves too little, are sent as they are. The residual is what this rank's own
    factors leave over, M - P Q_own^T.

    Args:
        rank: columns of a factor.
        min_ratio: a tensor is sent as factors where they have at least this many times fewer elements, from 1.
        seed: of the first step's start; any integer from 0, the same on every rank.
        wire: ``"bfloat16"`` or ``"int8"`` (a byte, and a scale for each 64): everything travels so, twice or nearly
            four times the rank for the bytes of float32; what the rounding takes away is part of the residual. None is
            the gradient's own dtype.
    """

    rank: int = 4
    min_ratio: float = 2.0
    seed: int = 0
    wire: str | None = None
    name: ClassVar[str] = "powersgd"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"powersgd needs a rank of at least 1, got {self.rank!r}")
        if not isinstance(self.min_ratio, int | float) or self.min_ratio < 1:
            raise ValueError(f"powersgd needs a min_ratio of at least 1, got {self.min_ratio!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"powersgd needs a seed from 0, got {self.seed!r}")
        if self.wire not in WIRES:
            raise ValueError(f"powersgd travels as bfloat16, int8 or (None) as the gradient is, got {self.wire!r}")

    def factors(self, shape: torch.Size) -> bool:
        """Whether a tensor of ``shape`` is sent as factors."""
        if len(shape) < 2 or not shape.numel():
            return False
        n, m = shape[0], shape[1:].numel()
        return n * m >= self.min_ratio * self.rank * (n + m)

    def compress(self, tensor: Tensor, state: State) -> Payload:
        (factors,) = self._rounds([tensor], [state], Communicator())
        wire = self._wire(tensor.dtype)
        return Payload(tuple(x for part in factors.sent for x in wire.travel(part)), tensor.shape, tensor.dtype)

    def encode(self, wanted: Tensor, dtype: torch.dtype, state: State) -> tuple[Tensor, ...]:
        """What travels in the first round."""
        return self._wire(dtype).travel(self._first(wanted, state))

    def decode(self, payload: Payload) -> Tensor:
        """What travels of P is M start: it becomes orthonormal here."""
        wire, whole = self._wire(payload.dtype), torch.empty(payload.shape, dtype=wide(payload.dtype), device="meta")
        if not self.factors(payload.shape):
            return wire.value(payload.tensors, whole)
        half, matrix = len(payload.tensors) // 2, whole.flatten(1)
        p = wire.value(payload.tensors[:half], matrix[:, : self.rank])
        q = wire.value(payload.tensors[half:], matrix.mT[:, : self.rank])
        return (orthonormal(p) @ q.mT).view(payload.shape)

    def exchange(self, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator) -> list[Tensor]:
        return [factors.total for factors in self._rounds(tensors, states, communicator)]

    def _rounds(self, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator) -> list[_Factors]:
        """One message for all P and whole tensors, and one for all Q."""
        wire = self._wire(tensors[0].dtype)
        wanted = [self.wanted(*each) for each in zip(tensors, states, strict=True)]
        first = wire.sum([self._first(*each) for each in zip(wanted, states, strict=True)], communicator)
        bases = [orthonormal(p) if self.factors(x.shape) else None for p, x in zip(first.totals, wanted, strict=True)]
        second = wire.sum([self._second(*each) for each in zip(wanted, bases, strict=True)], communicator)
        answers = []
        for i, (x, basis, state) in enumerate(zip(wanted, bases, states, strict=True)):
            p, q = first.totals[i], second.totals[i]
            if basis is None:
                answers.append(_Factors((p,), self._whole(x, p, first.shares[i], state)))
            else:
                answers.append(_Factors((p, q), self._answer(x, basis, q, second.shares[i], state)))
            state.step += 1
        return answers

    def _wire(self, dtype: torch.dtype) -> FactorWire:
        """How gradients of ``dtype`` travel."""
        return Int8Wire() if self.wire == "int8" else FloatWire(dtype if self.wire is None else torch.bfloat16)

    def _first(self, wanted: Tensor, state: State) -> Tensor:
        """The first round's part: P (n, rank) before it is orthonormal, or the whole tensor."""
        return wanted.flatten(1) @ self._start(wanted, state) if self.factors(wanted.shape) else wanted

    def _second(self, wanted: Tensor, basis: Tensor | None) -> Tensor:
        """The second round's part: Q (m, rank), or nothing (0,)."""
        return wanted.new_empty(0) if basis is None else wanted.flatten(1).mT @ basis

    def _answer(self, wanted: Tensor, basis: Tensor, q: Tensor, q_own: Tensor, state: State) -> Tensor:
        """P Q^T, after the residual and the next start are noted."""
        if self.error_feedback:
            state.keep(wanted - (basis @ q_own.mT).view_as(wanted))
        state.memory[START] = next_start(q, self._start(wanted, state))
        return (basis @ q.mT).view_as(wanted)

    def _whole(self, wanted: Tensor, total: Tensor, own: Tensor, state: State) -> Tensor:
        """The sum of what is sent as it is, after what rounding to ``wire`` took away is noted."""
        if self.error_feedback and self.wire is not None:
            state.keep(wanted - own)
        return total

    def _start(self, wanted: Tensor, state: State) -> Tensor:
        """(m, rank): the last step's Q, or normal numbers that are the same on every rank."""
        if START in state.memory:
            return state.memory[START]
        rows = torch.arange(wanted.shape[1:].numel(), device=wanted.device)[:, None]
        tensor, columns = torch.full_like(rows, state.tensor), torch.arange(self.rank, device=wanted.device)
        return normal(self.seed, Stream.FACTOR, tensor, rows, columns).to(wanted.dtype)


def next_start(q: Tensor, before: Tensor) -> Tensor:
    """Q (m, rank) with each column's largest element 1; a column of zeros, or not finite, stays what it was before.

    Only directions matter, and so scaled P = M Q is as large as M.
    """
    size = q.abs().amax(0)
    return torch.where((size > 0) & size.isfinite(), q / size, before)
