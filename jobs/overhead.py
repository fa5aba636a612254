"""What does the coordinator cost while nothing goes wrong? A training under it beside the same loop under torchrun.

    python jobs/overhead.py                       # 2 ranks, 40 steps, 3 rounds in turn
    python jobs/overhead.py --tokens 1024 --rounds 5

Prints each round's median step and the median overhead; exits non-zero where the two led to different weights. Measure
on a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from os.path import expanduser

import torch

from raybsa.cluster.journal import TrainingFailed
from raybsa.cluster.resources import TooFewResources
from raybsa.experiments.launch import NoCluster, cluster
from raybsa.experiments.options import at_least
from raybsa.experiments.overhead import WARMUP, Round, rounds
from raybsa.experiments.place import BAD_INPUT, FAILED, ending, interruptible, refusing
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.byte_lm import ByteText


def main() -> int:
    arguments = _arguments()
    with refusing():
        spec = TrialSpec(
            "byte_lm",
            (AttentionSpec("distributed", PatternSpec("bigbird"), 0.2, 16),),
            train_len=arguments.tokens,
            train_steps=arguments.steps,
            num_layers=2,
            num_heads=4,
            head_dim=32,
            task_params={"text": arguments.text, "train_batch": arguments.batch},
        )
        ByteText(spec, torch.device("cpu"))
    found: list[Round] = []
    with cluster(arguments.address, num_cpus=arguments.world_size):
        for each in rounds(spec, arguments.world_size, arguments.rounds):
            found.append(each)
            print(
                f"a step of {arguments.world_size} ranks: {each.coordinated.step_ms:.1f} ms under the coordinator, "
                f"{each.plain.step_ms:.1f} ms under torchrun: {each.overhead:+.1%}, weights "
                f"{'equal' if each.equal else 'DIFFERENT'}",
                flush=True,
            )
    print(f"median overhead of {len(found)} rounds: {statistics.median(each.overhead for each in found):+.1%}")
    return 0 if all(each.equal for each in found) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--address", help="Ray cluster; default: RAY_ADDRESS, else one of our own")
    parser.add_argument("--world-size", type=at_least(1), default=2, help="ranks, one CPU each")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(WARMUP + 2), default=40)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument(
        "--text", type=expanduser, help="file or folder; default: the Python standard library's sources"
    )
    return parser.parse_args()


if __name__ == "__main__":
    with (
        interruptible("the same command begins anew"),
        ending(FAILED, OSError, RuntimeError, TooFewResources, TrainingFailed),
        ending(BAD_INPUT, NoCluster),
    ):
        sys.exit(main())
