"""What is called, by the case's subject."""

from __future__ import annotations

from tests.fuzzing.adaptive import faults
from tests.fuzzing.case import Case
from tests.fuzzing.multihead import Multihead
from tests.fuzzing.parts import Parts
from tests.fuzzing.problem import Problem

__all__ = ["faults", "problem"]

PROBLEMS: dict[str, type[Problem]] = {"parts": Parts, "multihead": Multihead}


def problem(case: Case) -> Problem:
    """The case as a problem."""
    return PROBLEMS.get(case.subject, Problem)(case)
