"""Runs a case and says what is wrong with it: nothing, a refusal that is known, or a fault in words."""

from __future__ import annotations

import traceback
from typing import NamedTuple

import torch

from tests.fuzzing import refusals, seedless, subjects
from tests.fuzzing.budgets import Compared, working_dtype
from tests.fuzzing.case import Case
from tests.fuzzing.given import Given, Results
from tests.fuzzing.problem import Problem
from tests.fuzzing.transforms import TRANSFORMS

WRAPPING = ("compile", "export", "jit_trace", "make_fx", "make_fx_grad")
LINES = 14  # of an error's trace


class Outcome(NamedTuple):
    """``kind`` is ``right``, ``refused`` or ``wrong``; ``words`` say how; ``trace`` is an error's."""

    kind: str
    words: str = ""
    trace: str = ""


def run(case: Case) -> Outcome:
    """The outcome of a case; only what ends the process ends this."""
    torch.manual_seed(case.seed)
    torch.set_num_threads(case.threads)
    try:
        words = subjects.faults(case) if case.subject == "adaptive" else faults(subjects.problem(case))
    except Exception as error:  # whatever a call raises is looked up among the known refusals
        if refusals.is_known(case, error):
            return Outcome("refused", _first_line(error))
        return Outcome("wrong", _first_line(error), "".join(traceback.format_exc().splitlines(True)[-LINES:]))
    return Outcome("wrong", words) if words else Outcome("right")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def faults(problem: Problem) -> str:
    """How the product's results differ from the oracle's; nothing where they do not."""
    case, transform = problem.case, TRANSFORMS[problem.case.transform]
    given = Given(problem.call, problem.tensors, problem.names, problem.outputs, case)
    if case.warm:
        problem.warm()
    if case.misuse:
        return misuse_goes_through(given)
    if case.seedless:
        return seedless.fault(given)
    got = transform.run(given)
    wanted, rough = (transform.wanted(_by_oracle(problem, given, x)) for x in (torch.float64, working_dtype(case)))
    if list(got) != list(wanted):
        return f"results {list(got)} came, {list(wanted)} were wanted"
    compared = Compared(case, wanted, rough)
    beside = [f"by parts: {fault}" for fault in compared.faults(problem.beside(wanted))]
    return "; ".join([*wrong_types(problem, got), *compared.faults(got), *beside])


def misuse_goes_through(given: Given) -> str:
    """What is wrong about how a wrong call is refused; nothing where it is refused as it should be. Compilers and
    tracers wrap what they raise."""
    try:
        TRANSFORMS[given.case.transform].run(given)
    except (ValueError, TypeError):
        return ""
    except Exception as error:  # looked at below
        if given.case.transform in WRAPPING or refusals.is_known(given.case, error):
            return ""
        raise
    return f"a call that is wrong by {given.case.misuse} goes through"


def _by_oracle(problem: Problem, given: Given, dtype: torch.dtype) -> Given:
    """The same of the oracle, on the same numbers in a type."""
    xs = [x.detach().clone().to(dtype) if x.is_floating_point() else x for x in given.xs]
    return given._replace(f=problem.oracle, xs=xs)


def wrong_types(problem: Problem, got: Results) -> list[str]:
    """The results that are of another type than they must be."""
    working = working_dtype(problem.case)
    rules = {"out": working, "lse": torch.float64 if working == torch.float64 else torch.float32}
    rules |= {f"grad {n}": x.dtype for n, x in zip(problem.names, problem.tensors, strict=True)}
    wrong = {name: x.dtype for name, x in got.items() if x.dtype != rules.get(name, x.dtype)}
    return [f"{name} is {dtype}, {rules[name]} was wanted" for name, dtype in wrong.items()]
