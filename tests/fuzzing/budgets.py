"""How far a result may be off: some times the error of the oracle in the case's type, and some roundings of what it is
summed from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.fuzzing import inputs
from tests.fuzzing.case import Case
from tests.fuzzing.given import Results

FACTOR, ROUNDINGS = 8.0, 16.0
SMALLEST = 1e-12  # that a rounding counts as: the oracle has errors too
INF = float("inf")


def working_dtype(case: Case) -> torch.dtype:
    """The type of the product's outputs."""
    return inputs.dtype_of("bfloat16" if case.transform == "autocast" and case.dtype != "float64" else case.dtype)


@dataclass(frozen=True)
class Compared:
    """What is wanted of a case, in float64, and what the oracle makes of it in the case's own type."""

    case: Case
    wanted: Results
    rough: Results

    def faults(self, got: Results) -> list[str]:
        """In words, what differs by more than its budget."""
        return [found for name, x in got.items() if (found := self._fault(name, x))]

    def _fault(self, name: str, got: Tensor) -> str:
        dtype = got.dtype
        got, wanted, rough = (x.detach().double().cpu() for x in (got, self.wanted[name], self.rough[name]))
        if got.shape != wanted.shape:
            return f"{name} is {tuple(got.shape)}, {tuple(wanted.shape)} was wanted"
        if not torch.equal(got == -INF, wanted == -INF):
            return f"{name} is -inf in other places"
        got, wanted, rough = (x.masked_fill(x == -INF, 0.0) for x in (got, wanted, rough))
        if not got.isfinite().all():
            return f"{name} is not finite" if wanted.isfinite().all() else ""
        error, reference = largest(got - wanted), largest(rough - wanted)
        budget = FACTOR * reference + self._rounding(name, dtype)
        return (
            ""
            if error <= budget
            else f"{name} is off by {error:.3g}, {budget:.3g} allowed, {reference:.3g} the oracle's"
        )

    def _rounding(self, name: str, dtype: torch.dtype) -> float:
        epsilon = max(torch.finfo(dtype).eps, torch.finfo(working_dtype(self.case)).eps, SMALLEST)
        scale = largest(self.wanted[name])
        if name.startswith(("grad", "second", "tangent")):  # sums of terms that may cancel, each about as large as 1
            scale += 1 + max(largest(x) for other, x in self.wanted.items() if other.split()[0] == name.split()[0])
        if name in ("grad k", "grad m", "grad b"):
            scale *= 1 + math.sqrt(self.case.batch * self.case.heads * self.case.q_len)
        return ROUNDINGS * epsilon * scale * (1 + self.case.magnitude**2)  # scores are as large as that


def largest(x: Tensor) -> float:
    """The largest absolute number that is one."""
    return x.double().abs().nan_to_num(0.0, 0.0).max().item() if x.numel() else 0.0
