"""Do the algorithms learn? Each beside chance on a made-up landscape that costs nothing to ask.

    python -m raybsa.experiments.landscape --space families --trials 32 48 64 --seeds 6

The landscape is like what trainings showed (docs/search.md): families differ in how much quality they lose as density
falls, coarse blocks lose a little more, chance adds its noise. A line an algorithm: the mean hypervolume of fronts of
quality and density after so many trials, and its standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from statistics import mean, pstdev

import torch

from raybsa.counter import Stream, normal
from raybsa.experiments.algorithms import ALGORITHMS
from raybsa.experiments.presets import PRESETS
from raybsa.experiments.questions import Questions
from raybsa.experiments.space import Config, SearchSpace
from raybsa.experiments.spaces import make_space
from raybsa.printable import printable
from raybsa.results.hypervolume import hypervolume
from raybsa.results.pareto import DENSITY, quality_objective
from raybsa.spec import DENSE, stable_hash

_GOALS = (quality_objective("min"), DENSITY)
_DENSE, _LOSS, _WORST = 2.54, 0.15, 2.9  # bits a byte: the baseline's, lost in a decade of density, of the box
_COARSE = 0.006  # bits a byte lost for a doubling of the block size
_NOISE = 0.003


def quality(config: Config, families: Sequence[str]) -> float:
    """Bits a byte of a configuration: the first family loses least, the last half as much again."""
    if config["family"] == DENSE:
        return _DENSE
    rank = families.index(config["family"]) / max(1, len(families) - 1)
    loss = _LOSS * (1 + rank / 2) * math.log10(1 / config["density"])
    drawn = torch.tensor(int(stable_hash(config), 16) % 2**31)
    noise = _NOISE * float(normal(0, Stream.TASK, drawn))
    return _DENSE + loss + _COARSE * math.log2(config["block_size"]) + noise


def volumes(space: SearchSpace, algorithm: str, seed: int, trials: Sequence[int]) -> list[float]:
    """The front's hypervolume, as a share of the box, after so many trials."""
    questions = Questions(space, ALGORITHMS[algorithm](space, _GOALS, seed), _GOALS, trials=max(trials))
    low, families, points, found = math.log(space.densities[0]), sorted(space.families), [], []
    for number in range(max(trials)):
        config = questions.suggest(str(number))
        values = (quality(config, families), config.get("density", 1.0))
        questions.on_trial_complete(str(number), dict(zip(("quality", "density"), values, strict=True)))
        points.append(((values[0] - _DENSE) / (_WORST - _DENSE), (math.log(values[1]) - low) / -low))
        if number + 1 in trials:
            found.append(hypervolume(points, (1.0, 1.0)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    printable(sys.stdout)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="families", help="a name or a YAML file, without mixtures")
    parser.add_argument("--trials", type=int, nargs="+", default=[32, 48, 64])
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args(arguments)
    space = make_space(options.space, PRESETS["demo"].space.base)
    if space.mixtures or space.references:
        raise ValueError(f"a space of plain families was wanted, got mixtures or references in {options.space!r}")
    print(f"{'algorithm':<12}" + "".join(f"{f'{count} trials':>20}" for count in options.trials))
    for algorithm in (name for name in ALGORITHMS if name != "grid"):
        rows = zip(*(volumes(space, algorithm, s, options.trials) for s in range(options.seeds)), strict=True)
        print(f"{algorithm:<12}" + "".join(f"{f'{mean(row):.3f} ± {pstdev(row):.3f}':>20}" for row in rows), flush=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
