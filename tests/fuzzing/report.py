"""What is told of a fault: the case, the plainest case that still fails, and the commands that repeat them."""

from __future__ import annotations

import json
import re

from tests.fuzzing.case import Case
from tests.fuzzing.runner import Here, Runner

COMMAND = "python tests/fuzz.py"
PATIENCE = 80  # runs that a case may take to shrink


class Faults:
    """Counts faults and prints each kind once, shrunk.

    Args:
        seed: of the cases.
        options: of the command line, that draw them.
        runner: runs what is shrunk.
    """

    def __init__(self, seed: int, options: str, runner: Here | Runner) -> None:
        self.seed, self.options, self.runner = seed, options, runner
        self.kinds: dict[str, int] = {}

    @property
    def count(self) -> int:
        """Faults of different words."""
        return len(self.kinds)

    def add(self, index: int, case: Case, words: str, trace: str) -> None:
        kind = kind_of(words)
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if self.kinds[kind] > 1:
            print(f"again at --case {self.seed}:{index}: {words[:100]}", flush=True)
            return
        print(f"\n==== {words}\n{trace}{case}", flush=True)
        print(f"    {COMMAND} {self.options} --case {self.seed}:{index}", flush=True)
        small = shrink(self.runner, case, kind)
        print(f"and as plain as it fails: {small}\n    {COMMAND} --exactly '{json.dumps(small.to_dict())}'")
        print(script(small), flush=True)


def kind_of(words: str) -> str:
    """The first words without their numbers: what tells faults apart."""
    return re.sub(r"[\d.e+-]+", "#", words.partition(";")[0])[:80]


def shrink(runner: Here | Runner, case: Case, kind: str) -> Case:
    """The plainest case found that fails in the same words: many fields at once are made plain, then fewer, then sizes
    are halved."""
    tries = Tries(runner, kind)
    size = len(case.to_dict())
    while size:
        names = [name for name in case.to_dict() if name != "device"]
        chunks = [names[i : i + size] for i in range(0, len(names), size)]
        plainer = tries.first_wrong([case.without(chunk) for chunk in chunks])
        size = size if plainer else size // 2
        case = plainer or case
    while (plainer := tries.first_wrong(case.smaller())) is not None:
        case = plainer
    return case


class Tries:
    """Runs cases until one fails in the words of ``kind``, ``PATIENCE`` in all and none twice."""

    def __init__(self, runner: Here | Runner, kind: str) -> None:
        self.runner, self.kind = runner, kind
        self.tried: set[Case] = set()

    def first_wrong(self, cases: list[Case]) -> Case | None:
        return next((case for case in cases if self._is_wrong(case)), None)

    def _is_wrong(self, case: Case) -> bool:
        if case in self.tried or len(self.tried) >= PATIENCE:
            return False
        self.tried.add(case)
        found, words, _ = self.runner.run(case)
        return found == "wrong" and kind_of(words) == self.kind


def script(case: Case) -> str:
    """A program that runs the case, for a debugger."""
    return f"""    from tests.fuzzing.case import Case
    from tests.fuzzing.check import run

    print(*run({case}))"""
