"""Break a training on purpose, again and again, and see that it ends with the weights of the run without faults.

    python jobs/recovery_drill.py --out results/drill            # a default plan, under a minute on two cores
    python jobs/recovery_drill.py --out results/drill --full     # every (fault, place) pair

For every fault it prints how long it took to be noticed and to train again, the steps lost, and whether the final
weights are those of the undisturbed run, to the bit. It exits non-zero where they are not, or a fault never struck.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from raybsa.cluster.faults import Fault, FaultKind, FaultPlace, mark_file
from raybsa.cluster.member import MemberSettings
from raybsa.cluster.resources import Share, TooFewResources
from raybsa.cluster.training import Recovery, TrainingCoordinator, TrainingFailed, TrainingResult
from raybsa.experiments.launch import cluster
from raybsa.experiments.place import absolute, git_commit
from raybsa.experiments.recording import Run
from raybsa.experiments.trained import write_training
from raybsa.results.store import Store, StoreError
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec

KINDS = (FaultKind.EXIT, FaultKind.RAY_KILL, FaultKind.SIGKILL, FaultKind.SIGSTOP, FaultKind.OUT_OF_MEMORY)
DEFAULT = (
    (FaultKind.EXIT, FaultPlace.FORWARD_HOP),
    (FaultKind.SIGKILL, FaultPlace.BACKWARD_HOP),
    (FaultKind.SIGSTOP, FaultPlace.EXCHANGE),
    (FaultKind.RAY_KILL, FaultPlace.BEFORE_COMMIT),
    (FaultKind.OUT_OF_MEMORY, FaultPlace.BEFORE_FORWARD),
    (FaultKind.EXIT, FaultPlace.CHECKPOINT),
    (FaultKind.SIGKILL, FaultPlace.RECOVERY),
)
EVERY = 4  # steps between faults, and between checkpoints


def main() -> int:
    arguments = _arguments()
    try:
        out = absolute("--out", arguments.out)
        store = Store.create(out)
    except (ValueError, StoreError) as error:
        print(f"jobs/recovery_drill.py: {error}", file=sys.stderr)
        return 2
    pairs = list(product(KINDS, FaultPlace)) if arguments.full else arguments.fault or list(DEFAULT)
    run = Run.start("recovery_drill", git_commit(Path(__file__).parent))
    with (
        cluster(arguments.address, num_cpus=arguments.world_size + arguments.spares + 2),
        tempfile.TemporaryDirectory(prefix="raybsa-marks-") as marks,
    ):
        drill = Drill(arguments, store, run, marks)
        try:
            return 0 if drill.all_survive(_groups(pairs, arguments.at_once)) else 1
        except (TooFewResources, TrainingFailed) as error:
            print(f"jobs/recovery_drill.py: {error}", file=sys.stderr)
            return 1
        finally:
            print(f"results: {out}")


class Drill:
    """Runs of one question: one without faults for each length, and one for each plan."""

    def __init__(self, arguments: argparse.Namespace, store: Store, run: Run, marks: str) -> None:
        self._arguments, self._store, self._run, self._marks = arguments, store, run, marks
        self._random = random.Random(arguments.seed)
        self._undisturbed: dict[int, TrainingResult] = {}
        self._runs = 0

    def all_survive(self, groups: Sequence[Sequence[tuple[FaultKind, FaultPlace]]]) -> bool:
        print(f"{'fault':58s}{'noticed':>10s}{'trains again':>14s}{'steps lost':>12s}{'filled by':>11s}  weights")
        good = True
        for pairs in groups:
            good &= self._survives(pairs)
        return good

    def _survives(self, pairs: Sequence[tuple[FaultKind, FaultPlace]]) -> bool:
        plan = self._plan(pairs)
        steps = EVERY * (len(pairs) + 2)
        if steps not in self._undisturbed:
            self._undisturbed[steps] = self._train(steps, ())
        wanted, result = self._undisturbed[steps], self._train(steps, plan)
        equal = result.digest == wanted.digest
        struck = self._tell([fault for faults in plan for fault in faults], result.recoveries, equal)
        return equal and struck

    def _plan(self, pairs: Sequence[tuple[FaultKind, FaultPlace]]) -> list[tuple[Fault, ...]]:
        """One fault a generation, at a rank drawn from the seed. A fault while recovering needs one to recover from."""
        plan: list[tuple[Fault, ...]] = []
        for number, (kind, place) in enumerate(pairs):
            step = EVERY * (number + 1)
            rank = self._random.randrange(self._arguments.world_size)
            if place is FaultPlace.CHECKPOINT:
                rank = 0  # who writes it; the phase comes when ``step`` steps are applied
            if place is FaultPlace.RECOVERY:
                first = Fault(FaultKind.EXIT, FaultPlace.EXCHANGE, (rank + 1) % self._arguments.world_size, step)
                plan += [(first,), (Fault(kind, place, rank, -1),)]
            else:
                plan.append((Fault(kind, place, rank, step),))
        return plan

    def _train(self, steps: int, plan: Sequence[tuple[Fault, ...]]) -> TrainingResult:
        arguments = self._arguments
        with tempfile.TemporaryDirectory(prefix="raybsa-drill-") as folder:
            settings = MemberSettings(checkpoints=folder, checkpoint_every=EVERY, marks=self._marks)
            spec = _question(steps, arguments.text)
            with TrainingCoordinator(
                spec,
                Share(1),
                world_size=arguments.world_size,
                spares=arguments.spares if plan else 0,
                settings=settings,
                heartbeat_s=arguments.heartbeat,
                replace_s=60.0,
                plan=plan,
                say=lambda text: None,
            ) as coordinator:
                result = coordinator.run(evaluate=False)
            write_training(self._store, self._run, self._runs, spec, settings, "cpu", result)
            self._runs += 1
        return result

    def _tell(self, faults: Sequence[Fault], recoveries: Sequence[Recovery], equal: bool) -> bool:
        """A line a fault; False where one never struck."""
        by_generation = {recovery.generation: recovery for recovery in recoveries}
        all_struck, recovery = True, None
        for generation, fault in enumerate(faults, 1):
            recovery = by_generation.get(generation, recovery)
            mark = mark_file(self._marks, fault)
            struck = mark.exists()
            all_struck &= struck
            if not struck or recovery is None:
                print(f"{fault!s:58s}  NEVER STRUCK", flush=True)
                continue
            while_recovering = fault.place is FaultPlace.RECOVERY
            noticed = "-" if while_recovering else f"{recovery.noticed_at - float(mark.read_text()):.3f} s"
            weights = "equal" if equal else "DIFFERENT"
            print(
                f"{fault!s:58s}{noticed:>10s}{recovery.resumed_in_s:>12.3f} s{recovery.steps_lost:>12d}"
                f"{recovery.filled:>11s}  {weights}",
                flush=True,
            )
            mark.unlink()
        return all_struck


def _question(steps: int, text: str | None) -> TrialSpec:
    attention = AttentionSpec("distributed", PatternSpec("bigbird"), 0.5, 16)
    params = {"text": text, "train_batch": 2, "eval_windows": 2}
    return TrialSpec(
        "byte_lm", (attention,), train_len=256, train_steps=steps, num_heads=2, head_dim=16, task_params=params
    )


def _pair(text: str) -> tuple[FaultKind, FaultPlace]:
    kind, _, place = text.partition(":")
    if kind not in list(KINDS) or place not in list(FaultPlace):
        raise argparse.ArgumentTypeError(
            f"a fault is KIND:PLACE, a kind of {', '.join(KINDS)} and a place of {', '.join(FaultPlace)}, got {text!r}"
        )
    return FaultKind(kind), FaultPlace(place)


def _groups(pairs: Sequence[tuple[FaultKind, FaultPlace]], size: int) -> list[Sequence[tuple[FaultKind, FaultPlace]]]:
    """Several faults share a run: making actors is what takes time."""
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="results/drill", help="results folder or URI")
    parser.add_argument("--address", help="Ray cluster; default: RAY_ADDRESS, else one of our own")
    parser.add_argument("--full", action="store_true", help="every kind at every place")
    parser.add_argument("--fault", nargs="+", type=_pair, help="KIND:PLACE ..., instead of the default plan")
    parser.add_argument("--world-size", type=int, default=4, help="ranks")
    parser.add_argument("--spares", type=int, default=1, help="warm workers that wait for a loss")
    parser.add_argument("--heartbeat", type=float, default=2.0, help="seconds of silence after which a rank is lost")
    parser.add_argument("--at-once", type=int, default=7, help="faults in one run")
    parser.add_argument("--text", help="file or folder; default: the Python standard library's sources")
    parser.add_argument("--seed", type=int, default=0, help="which ranks are hit")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
