"""Whose fault a failure is: the question's own, which would fail anywhere, or the machine's, which passes."""

from __future__ import annotations

import torch
from ray.exceptions import OutOfMemoryError, RayTaskError

from raybsa.cluster.resources import TooFewResources
from raybsa.results.record import MACHINE, QUESTION, UNKNOWN

# What a program raises again wherever it runs with the same arguments. That memory ran out or a GPU failed is none of
# these: it is a RuntimeError or a MemoryError.
PROGRAM_ERRORS = (
    ValueError,
    TypeError,
    ArithmeticError,
    LookupError,
    AttributeError,
    NameError,
    AssertionError,
    NotImplementedError,
)
_MACHINE_ERRORS = (OSError, MemoryError, torch.OutOfMemoryError, OutOfMemoryError, TooFewResources)


def whose(error: BaseException) -> str:
    """``QUESTION``, ``MACHINE`` (disk, permissions, memory, time, room) or ``UNKNOWN``, by the error's type alone."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, _MACHINE_ERRORS):
        return MACHINE
    return QUESTION if isinstance(cause, PROGRAM_ERRORS) else UNKNOWN
