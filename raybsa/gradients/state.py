"""What a codec remembers of one tensor between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class State:
    """The memory of one tensor on one rank. Its tensors are replaced, never written to, so ``copy`` is a snapshot that
    costs nothing, and a step that failed is undone by going back to it.

    Args:
        tensor: which tensor of the model, the same number on every rank; part of what random numbers are drawn from.
        rank: whose state it is; the other part.
        step: how often the tensor was compressed.
        residual: error feedback's sum of all that was not sent yet, of the tensor's shape, in float32 or float64.
        memory: what else a codec keeps (PowerSGD: the factor it starts from).
    """

    tensor: int = 0
    rank: int = 0
    step: int = 0
    residual: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)

    def copy(self) -> State:
        """A state of its own; tensors are shared, since they are never written to."""
        return replace(self, memory=dict(self.memory))

    def norm(self) -> float:
        """The Euclidean norm of the residual, in units of what was to be sent; 0 where there is none."""
        return 0.0 if self.residual is None else float(torch.linalg.vector_norm(self.residual))

    def keep(self, error: Tensor) -> None:
        """Makes ``error`` the residual, but for elements that are not finite: those keep what they had (else 0)."""
        before = torch.zeros_like(error) if self.residual is None else self.residual
        self.residual = torch.where(error.isfinite(), error, before)

    def state_dict(self) -> dict[str, Any]:
        """Step, residual and memory. The tensors are the state's own, which is safe: it never writes to them."""
        return {"step": self.step, "residual": self.residual, "memory": dict(self.memory)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes what ``state_dict`` gave."""
        self.step, self.residual, self.memory = saved["step"], saved["residual"], dict(saved["memory"])
