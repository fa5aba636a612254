"""PowerSGD: a matrix travels as two thin factors, found by one step of subspace iteration that ranks take together
(Vogels, Karimireddy, Jaggi, 1905.13727; algorithm 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.counter import Stream, normal
from raybsa.gradients.codec import LossyCodec, Payload, wide
from raybsa.gradients.orthonormal import orthonormal
from raybsa.gradients.state import State
from raybsa.gradients.wire import all_reduce

START = "start"
Reduce = Callable[[list[Tensor]], list[Tensor]]


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
        wire: ``"bfloat16"``: everything travels so, twice the rank for the bytes of float32; what the rounding takes
            away is part of the residual. None is the gradient's own dtype.
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
        if self.wire not in (None, "bfloat16"):
            raise ValueError(f"powersgd travels as bfloat16 or (None) as the gradient is, got {self.wire!r}")

    def factors(self, shape: torch.Size) -> bool:
        """Whether a tensor of ``shape`` is sent as factors."""
        if len(shape) < 2 or not shape.numel():
            return False
        n, m = shape[0], shape[1:].numel()
        return n * m >= self.min_ratio * self.rank * (n + m)

    def compress(self, tensor: Tensor, state: State) -> Payload:
        return self._rounds([tensor], [state], list)[0][0]

    def encode(self, wanted: Tensor, dtype: torch.dtype, state: State) -> tuple[Tensor, ...]:
        """The first round's part: P (n, rank), or the whole tensor, in ``wire`` or else in ``dtype``."""
        dtype = dtype if self.wire is None else getattr(torch, self.wire)
        if not self.factors(wanted.shape):
            return (wanted.to(dtype),)
        return ((wanted.flatten(1) @ self._start(wanted, state)).to(dtype),)

    def decode(self, payload: Payload) -> Tensor:
        """What travels of P is M start: it becomes orthonormal here."""
        p, *q = (x.to(wide(payload.dtype)) for x in payload.tensors)
        return (orthonormal(p) @ q[0].mT).view(payload.shape) if q else p

    def exchange(self, tensors: Sequence[Tensor], states: Sequence[State], communicator: Communicator) -> list[Tensor]:
        return [total for _, total in self._rounds(tensors, states, lambda parts: all_reduce(parts, communicator))]

    def _rounds(
        self, tensors: Sequence[Tensor], states: Sequence[State], reduce: Reduce
    ) -> list[tuple[Payload, Tensor]]:
        """What all ranks sent, and what it says; ``reduce`` sums over ranks, once for all P and once for all Q."""
        wanted = [self.wanted(*each) for each in zip(tensors, states, strict=True)]
        own = [self.encode(x, t.dtype, state)[0] for x, t, state in zip(wanted, tensors, states, strict=True)]
        first = reduce(own)
        bases = [self._basis(p, x) for p, x in zip(first, wanted, strict=True)]
        own = [self._second(p, x, basis) for p, x, basis in zip(first, wanted, bases, strict=True)]
        second = reduce(own)
        answers = []
        for i, (x, p, basis, q, state) in enumerate(zip(wanted, first, bases, second, states, strict=True)):
            if basis is None:
                total = self._whole(x, p, tensors[i].dtype, state)
            else:
                total = self._answer(x, basis, own[i], q, state)
            state.step += 1
            answers.append((Payload((p,) if basis is None else (p, q), x.shape, tensors[i].dtype), total))
        return answers

    def _basis(self, p: Tensor, wanted: Tensor) -> Tensor | None:
        """P (n, rank) with orthonormal columns; None of a tensor that is sent as it is."""
        return orthonormal(p.to(wanted.dtype)) if self.factors(wanted.shape) else None

    def _second(self, p: Tensor, wanted: Tensor, basis: Tensor | None) -> Tensor:
        """The second round's part, in p's dtype: Q (m, rank), or nothing (0,)."""
        return p.new_empty(0) if basis is None else (wanted.flatten(1).mT @ basis).to(p.dtype)

    def _answer(self, wanted: Tensor, basis: Tensor, q_own: Tensor, q: Tensor, state: State) -> Tensor:
        """P Q^T, after the residual and the next start are noted."""
        if self.error_feedback:
            state.keep(wanted - (basis @ q_own.to(basis.dtype).mT).view_as(wanted))
        q = q.to(basis.dtype)
        state.memory[START] = next_start(q, self._start(wanted, state))
        return (basis @ q.mT).view_as(wanted)

    def _whole(self, wanted: Tensor, total: Tensor, dtype: torch.dtype, state: State) -> Tensor:
        """The sum of what is sent as it is, after what rounding to ``wire`` took away is noted."""
        if self.error_feedback and self.wire is not None:
            state.keep(wanted - self.encode(wanted, dtype, state)[0].to(wanted.dtype))
        return total.to(wanted.dtype)

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
