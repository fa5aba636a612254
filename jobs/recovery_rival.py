"""How soon does a training go on when a rank is killed? Our coordinator beside Ray Train with its FailureConfig.

    python jobs/recovery_rival.py                 # 3 ranks, 3 rounds in turn
    python jobs/recovery_rival.py --rounds 5

The same training on the same machine, one rank killed by SIGKILL right after a checkpoint; the time is from the kill to
when the interrupted step was applied. Exits non-zero where the weights at the end differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from os.path import expanduser

import torch

from raybsa.cluster.journal import TrainingFailed
from raybsa.cluster.resources import TooFewResources
from raybsa.experiments.drill_plan import question
from raybsa.experiments.launch import NoCluster, cluster
from raybsa.experiments.options import at_least
from raybsa.experiments.place import BAD_INPUT, FAILED, ending, interruptible, refusing
from raybsa.experiments.recovery_rival import RIVAL, STEPS, VICTIM, Killed, rounds
from raybsa.tasks.byte_lm import ByteText


def main() -> int:
    arguments = _arguments()
    with refusing():
        ByteText(question(STEPS, arguments.text), torch.device("cpu"))
    found: dict[str, list[Killed]] = {}
    with cluster(arguments.address, num_cpus=arguments.world_size + 2, deaths=False):
        for each in rounds(arguments.world_size, arguments.rounds, arguments.text):
            for killed in each:
                found.setdefault(killed.system, []).append(killed)
            print("; ".join(f"{killed.system} {killed.seconds:.2f} s" for killed in each), flush=True)
    print(*summary(found), sep="\n")
    return 0 if len({killed.digest for rows in found.values() for killed in rows}) == 1 else 1


def summary(found: dict[str, list[Killed]]) -> list[str]:
    """A line for each system, its median beside Ray Train's, and whether all trainings led to the same weights."""
    medians = {system: statistics.median(killed.seconds for killed in rows) for system, rows in found.items()}
    slowest = medians[RIVAL]
    lines = [f"{system:26s}median {seconds:6.2f} s, {slowest / seconds:5.1f} x" for system, seconds in medians.items()]
    digests = {killed.digest for rows in found.values() for killed in rows}
    return [*lines, f"weights at the end: {'equal, to the bit' if len(digests) == 1 else 'DIFFERENT'}"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--address", help="Ray cluster; default: RAY_ADDRESS, else one of our own")
    parser.add_argument("--world-size", type=at_least(VICTIM + 1), default=3, help="ranks, one CPU each")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument(
        "--text", type=expanduser, help="file or folder; default: the Python standard library's sources"
    )
    return parser.parse_args()


if __name__ == "__main__":
    with (
        interruptible("the same command begins anew"),
        ending(FAILED, TooFewResources, TrainingFailed, RuntimeError),
        ending(BAD_INPUT, NoCluster),
    ):
        sys.exit(main())
