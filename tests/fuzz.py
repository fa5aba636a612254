"""Random calls of the product against an independent float64 reference.

    python tests/fuzz.py --seconds 60 --seed 7       # random cases of one seed
    python tests/fuzz.py --seconds 60 --device cuda  # the same on a GPU, with its backends
    python tests/fuzz.py --case 7:123                # one of them again
    python tests/fuzz.py --exactly '{"causal": true}'  # a case by its fields, as a fault's report prints it
    python -m pdb tests/fuzz.py --here --case 7:123

Ends with 1 where a fault was found. What is refused in words counts as right where ``tests/fuzzing/refusals.py`` knows
the words and the case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # the project in the place of tests/, whose selectors would hide Python's
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests.fuzzing import report
from tests.fuzzing.case import Case
from tests.fuzzing.draw import draw
from tests.fuzzing.runner import Here, Runner


def main(arguments: list[str] | None = None) -> int:
    asked = _parse(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with Here() if asked.here else Runner(asked.timeout) as runner:
        if asked.case or asked.exactly:
            return _one(asked, runner)
        return _many(asked, runner)


def _one(asked: argparse.Namespace, runner: Here | Runner) -> int:
    if asked.exactly:
        case = Case.of(json.loads(asked.exactly))
    else:
        seed, index = map(int, asked.case.split(":"))
        case = drawn(asked, seed, index)
    kind, words, trace = runner.run(case)
    print(f"{case}\n{trace}{kind}: {words}")
    return kind == "wrong"


def _many(asked: argparse.Namespace, runner: Here | Runner) -> int:
    options = f"--device {asked.device}" + (f" --backend {asked.backend}" if asked.backend else "")
    end, index, faults = time.monotonic() + asked.seconds, 0, report.Faults(asked.seed, options, runner)
    counted: dict[str, int] = {}
    while time.monotonic() < end and index < asked.cases and faults.count < asked.faults:
        case = drawn(asked, asked.seed, index)
        kind, words, trace = runner.run(case)
        counted[kind] = counted.get(kind, 0) + 1
        if kind == "wrong":
            faults.add(index, case, words, trace)
        index += 1
    print(f"seed {asked.seed}: {index} cases, {', '.join(f'{n} {kind}' for kind, n in sorted(counted.items()))}")
    return faults.count > 0


def drawn(asked: argparse.Namespace, seed: int, index: int) -> Case:
    case = draw(seed, index, asked.device)
    return replace(case, backend=asked.backend) if asked.backend else case


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="when to stop")
    parser.add_argument("--cases", type=int, default=10**9, help="how many to run at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backend", help="for all cases; your own too, as 'module:Name'")
    parser.add_argument("--case", metavar="SEED:INDEX", help="run this one alone")
    parser.add_argument("--exactly", metavar="JSON", help="run the case of these fields alone")
    parser.add_argument("--faults", type=int, default=10, help="stop after so many")
    parser.add_argument("--here", action="store_true", help="run cases in this process, for a debugger")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds that a case may take")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
