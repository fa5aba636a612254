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
        """A number that all outputs decide; -inf counts as 0."""
        terms = []
        for i, x in enumerate(found):
            finite = torch.where(x == float("-inf"), torch.zeros_like(x), x)
            wide = torch.promote_types(x.dtype, torch.float32)
            terms.append((finite * inputs.gradient_for(x, i)).sum(dtype=wide))
        return sum(terms[1:], terms[0])


def values(given: Given) -> Results:
    with torch.no_grad():
        return given.named(given.f(*given.xs))


def gradients(given: Given, leaves: list[Tensor] | None = None) -> Results:
    leaves = given.leaves() if leaves is None else leaves
    found = given.f(*leaves)
    results = given.named([x.detach() for x in found])
    if given.asked and any(x.requires_grad for x in found):
        given.loss(found).backward()
    return results | {f"grad {given.names[i]}": _grad(leaves[i]) for i in given.asked}


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
