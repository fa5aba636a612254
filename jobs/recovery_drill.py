"""Break a training on purpose, again and again, and see that it ends with the weights of the run without faults.

    python jobs/recovery_drill.py --out results/drill            # a default plan, under a minute on two cores
    python jobs/recovery_drill.py --out results/drill --full     # every (fault, place) pair
    python jobs/recovery_drill.py --out results/drill --soak 200 # that many faults over one run; what is left behind
    python jobs/recovery_drill.py --out results/drill --world-size 1 --gpus-per-worker 0.5 \
        --fault cuda_error:before_forward out_of_memory:exchange  # a GPU's own faults; the spare is on the same GPU

For every fault it prints how long it took to be noticed and to train again, the steps lost, and whether the final
weights are those of the undisturbed run, to the bit; then each kind's median and worst. It exits non-zero where weights
differ, or a fault never struck; a soak also where a process, port, thread or file stays, or the driver's memory grows.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product
from os.path import expanduser
from pathlib import Path

import torch

from raybsa.cluster.faults import FaultKind, FaultPlace
from raybsa.cluster.journal import TrainingFailed
from raybsa.cluster.resources import Share, TooFewResources
from raybsa.experiments import drill_summary
from raybsa.experiments.drill import Drill, Survived, estimate_minutes, timed
from raybsa.experiments.drill_plan import DEFAULT, Pair, groups, kinds_on, left_out_on, question, steps_for
from raybsa.experiments.drill_ring import Ring
from raybsa.experiments.launch import NoCluster, cluster
from raybsa.experiments.options import add_adopt, at_least, seed
from raybsa.experiments.place import BAD_INPUT, FAILED, absolute, ending, git_commit, interruptible, refusing
from raybsa.experiments.recording import Run
from raybsa.experiments.soak import own_temporary_folder, soak
from raybsa.results.store import Store
from raybsa.tasks.byte_lm import ByteText

HEAD = f"{'fault':58s}{'noticed':>10s}{'trains again':>14s}{'steps lost':>12s}{'filled by':>11s}  weights"


def main() -> int:
    arguments = _arguments()
    with refusing():
        share = Share(1, arguments.gpus_per_worker)
        for kind in {kind for kind, _ in arguments.fault or ()} & {*left_out_on(share.device)}:
            raise ValueError(f"{kind}: {left_out_on(share.device)[kind]}")
        shape = (arguments.world_size, arguments.spares, arguments.heartbeat)
        ring = Ring(*shape, arguments.text, arguments.verbose, share)
        ByteText(question(1, ring.text), torch.device("cpu"))
        out = absolute("--out", arguments.out)
        store = Store.create(out, adopt=arguments.adopt)
    num_cpus = ring.world_size + ring.spares + 2
    with own_temporary_folder(), cluster(arguments.address, num_cpus=num_cpus, deaths=arguments.verbose):
        try:
            if arguments.soak:
                return 0 if _soak(ring, arguments.soak, arguments.seed) else 1
            run = Run.start("recovery_drill", git_commit(Path(__file__).parent))
            return 0 if _drill(Drill(ring, store, run, arguments.seed), ring, arguments) else 1
        finally:
            print(f"results: {out}")


def _drill(drill: Drill, ring: Ring, arguments: argparse.Namespace) -> bool:
    pairs = (
        list(product(kinds_on(ring.share.device), FaultPlace)) if arguments.full else arguments.fault or list(DEFAULT)
    )
    grouped = groups(pairs, arguments.at_once)
    seconds = timed(drill, steps_for(grouped[0]))
    print(
        f"{len(pairs)} faults in {len(grouped)} runs; one run in peace took {seconds:.0f} s: "
        f"about {estimate_minutes(grouped, ring, seconds):.1f} minutes"
    )
    if arguments.full:
        print("left out: " + "; ".join(f"{kind} ({why})" for kind, why in left_out_on(ring.share.device).items()))
    print(HEAD, flush=True)
    begin, rows = time.monotonic(), list[Survived]()
    for group in grouped:
        for row in drill.survive(group):
            rows.append(row)
            print(_line(row), flush=True)
    print(drill_summary.HEAD, *map(drill_summary.line_of, drill_summary.summaries(rows)), sep="\n")
    print(f"{drill_summary.verdict(rows)}, in {(time.monotonic() - begin) / 60:.1f} minutes")
    return all(row.good for row in rows)


def _soak(ring: Ring, count: int, seed: int) -> bool:
    print(f"{count} faults of seed {seed} over one run\n{HEAD}", flush=True)
    soaked = soak(
        ring,
        count,
        seed,
        lambda step, recoveries, mib: print(f"step {step}: {recoveries} recoveries, {mib:.0f} MiB", flush=True),
    )
    print(*map(_line, soaked.faults), sep="\n")
    print(drill_summary.HEAD, *map(drill_summary.line_of, drill_summary.summaries(soaked.faults)), sep="\n")
    good = sum(fault.good for fault in soaked.faults)
    left = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in soaked.left.items()) or "nothing"
    print(
        f"{good} of {count} faults as wanted in {soaked.seconds / 60:.1f} minutes; left behind: {left}; "
        f"the driver's memory grew by {soaked.growth_mib:.1f} MiB"
    )
    return soaked.good


def _line(row: Survived) -> str:
    if row.resumed_in_s is None:
        return f"{row.fault!s:58s}  NEVER STRUCK"
    noticed = "-" if row.noticed_in_s is None else f"{row.noticed_in_s:.3f} s"
    return (
        f"{row.fault!s:58s}{noticed:>10s}{row.resumed_in_s:>12.3f} s{row.steps_lost:>12d}{row.filled:>11s}  "
        f"{'equal' if row.equal else 'DIFFERENT'}"
    )


def _pair(text: str) -> Pair:
    kind, _, place = text.partition(":")
    kinds = kinds_on("cuda")
    if kind not in list(kinds) or place not in list(FaultPlace):
        raise argparse.ArgumentTypeError(
            f"a fault is KIND:PLACE, a kind of {', '.join(kinds)} and a place of {', '.join(FaultPlace)}, got {text!r}"
        )
    return FaultKind(kind), FaultPlace(place)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="results/drill", help="results folder or URI")
    add_adopt(parser)
    parser.add_argument("--address", help="Ray cluster; default: RAY_ADDRESS, else one of our own")
    parser.add_argument("--full", action="store_true", help="every kind at every place")
    parser.add_argument("--fault", nargs="+", type=_pair, help="KIND:PLACE ..., instead of the default plan")
    parser.add_argument(
        "--soak", type=at_least(1), metavar="N", help="N drawn faults over one run, and what is left behind"
    )
    parser.add_argument("--world-size", type=int, default=4, help="ranks")
    parser.add_argument("--spares", type=int, default=1, help="warm workers that wait for a loss")
    parser.add_argument("--gpus-per-worker", type=float, default=0.0, help="a GPU, or a share of one; 0: on CPUs")
    parser.add_argument("--heartbeat", type=float, default=2.0, help="seconds of silence after which a rank is lost")
    parser.add_argument("--at-once", type=at_least(1), default=7, help="faults in one run")
    parser.add_argument(
        "--text", type=expanduser, help="file or folder; default: the Python standard library's sources"
    )
    parser.add_argument("--verbose", action="store_true", help="with what Ray says of each worker that died")
    parser.add_argument("--seed", type=seed, default=0, help="which ranks are hit; of a soak also how and where")
    return parser.parse_args()


if __name__ == "__main__":
    with (
        interruptible("what ended is in --out; the same command begins anew"),
        ending(FAILED, OSError, TooFewResources, TrainingFailed),
        ending(BAD_INPUT, NoCluster),
    ):
        sys.exit(main())
