"""Dropout that draws its own seed: which weights it took nobody knows, but the output is linear in v, so that
``<gradient of v, v>`` equals ``<weights, out>`` for the mask that the forward used, and for no other."""

from __future__ import annotations

import torch

from tests.fuzzing.budgets import working_dtype
from tests.fuzzing.given import Given
from tests.fuzzing.inputs import gradient_for
from tests.fuzzing.transforms import TRANSFORMS


def fault(given: Given) -> str:
    """What is wrong about the gradient of a case with dropout and a loss that weighs the output; nothing where it is
    right."""
    got = TRANSFORMS[given.case.transform].run(given)
    v = given.xs[given.names.index("v")].double()
    by_v = got["grad v"].double() * v
    by_out = got["out"].double() * gradient_for(got["out"], 0).double()
    error = (by_v.sum() - by_out.sum()).abs().item()
    budget = 16 * torch.finfo(working_dtype(given.case)).eps * (1 + by_v.abs().sum() + by_out.abs().sum()).item()
    return (
        "" if error <= budget else f"the gradient of v is of another dropout: off by {error:.3g}, {budget:.3g} allowed"
    )
