"""What a transform is done to, and the plain ways to look at it: the values, and the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tests.fuzzing import inputs
from tests.fuzzing.case import Case

Function = Callable[..., tuple[Tensor, ...]]
Results = dict[str, Tensor]


class Given(NamedTuple):
    """What a transform is done to: ``f`` of ``xs``, whose names are ``names``; ``outputs`` those of what it gives."""

    f: Function
    xs: Sequence[Tensor]
    names: Sequence[str]
    outputs: Sequence[str]
    case: Case

    @property
    def asked(self) -> list[int]:
        """The inputs that ask for a gradient."""
        floats = [i for i, x in enumerate(self.xs) if x.is_floating_point()]
        return [i for i in floats if self.names[i][0] in self.case.grad_of]

    def named(self, found: Sequence[Tensor]) -> Results:
        return dict(zip(self.outputs, found, strict=False))

    def leaves(self) -> list[Tensor]:
        """The tensors, as they lie in memory; those that are asked want a gradient."""
        return [x.detach().requires_grad_(i in self.asked) for i, x in enumerate(self.xs)]

    def loss(self, found: Sequence[Tensor]) -> Tensor:
        """A number that the outputs decide, as the case says; -inf counts as 0."""
        kind = self.case.loss
        some = {"first": found[:1], "last": found[-1:]}.get(kind, found)
        terms = []
        for i, x in enumerate(some):
            finite = x if i == 0 and x is not found[-1] else torch.where(x == float("-inf"), torch.zeros_like(x), x)
            wide = torch.promote_types(x.dtype, torch.float32)
            terms.append(LOSSES[kind](finite, inputs.gradient_for(x, i)).sum(dtype=wide))
        return sum(terms[1:], terms[0])


def _transposed(x: Tensor, weights: Tensor) -> Tensor:
    """The gradient lies in memory with its last dimension first."""
    if x.dim() < 2:
        return x * weights
    return x.transpose(-1, -2) * weights.transpose(-1, -2).contiguous()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted": torch.mul,
    "sum": lambda x, weights: x,  # the gradient is one number, expanded
    "transposed": _transposed,
    "first": torch.mul,
    "last": torch.mul,
}


def values(given: Given) -> Results:
    with torch.no_grad():
        return given.named(given.f(*given.xs))


def gradients(given: Given, leaves: list[Tensor] | None = None) -> Results:
    leaves = given.leaves() if leaves is None else leaves
    found = given.f(*leaves)
    results = given.named([x.detach() for x in found])
    loss = given.loss(found)
    if loss.requires_grad:
        loss.backward()
    return results | {f"grad {given.names[i]}": grad_of(leaves[i]) for i in given.asked}


def grad_of(leaf: Tensor) -> Tensor:
    """Its gradient; zeros where nothing depends on it."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
