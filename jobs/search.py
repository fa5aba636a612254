"""Which block-sparse pattern gives the best quality for its cost on this text and this machine?

    python jobs/search.py --out results/search --preset quick
    ray job submit --working-dir . -- python jobs/search.py --out /absolute/results --text /absolute/text

Run directly it uses a Ray cluster of its own (or the one of --address); submitted, the cluster it was submitted to.
Every trial is in --out as soon as it ends, the report is written last.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

from dashboards.report import write_own_report
from raybsa import signals
from raybsa.cluster.coordinator import WorkerNotMade
from raybsa.cluster.resources import Share, TooFewResources
from raybsa.cluster.ring_coordinator import coordinator_of
from raybsa.experiments.advantage import advantage
from raybsa.experiments.algorithms import ALGORITHMS
from raybsa.experiments.dry_run import dry_run
from raybsa.experiments.front import left_out, read_best, write_front
from raybsa.experiments.history import asked_otherwise, history
from raybsa.experiments.launch import NoCluster, cluster, worker_share
from raybsa.experiments.options import add_adopt, at_least, not_negative, positive, seed
from raybsa.experiments.place import BAD_INPUT, FAILED, absolute, ending, git_commit, interruptible, refusing
from raybsa.experiments.presets import PRESETS, Preset
from raybsa.experiments.progress import Progress, summary
from raybsa.experiments.recording import Run
from raybsa.experiments.search import Found, Plan, Pool, search
from raybsa.experiments.spaces import PAPERS, SPACES, make_space
from raybsa.experiments.trial import run_trial
from raybsa.results.pareto import COSTS, named_objectives
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from raybsa.tasks.byte_lm import about_its_text
from raybsa.tasks.captured import question_of
from raybsa.tasks.goals import QUALITIES
from raybsa.tasks.module import question_of as question_of_module
from raybsa.tasks.recall import recall_params

SIZES = {
    "seq_len": int,
    "train_len": int,
    "train_steps": int,
    "learning_rate": float,
    "num_layers": int,
    "num_heads": int,
    "head_dim": int,
    "batch": int,
    "dtype": str,
}
AGAIN = "the same command with --resume goes on"
_UNITS = {"s": 1, "m": 60, "h": 3600}


def main() -> int:
    arguments = _arguments()
    if arguments.again:
        return _again(arguments)
    with refusing(NotImplementedError):
        Share(arguments.cpus_per_worker, arguments.gpus_per_worker or 0)
        out = absolute("--out", arguments.out)
        preset = _preset(arguments)
        plan = _plan(arguments, preset)
        store = Store(out) if arguments.dry_run else Store.create(out, adopt=arguments.adopt)
    if arguments.dry_run:
        return _dry_run(arguments, preset, plan, store)
    records = store.read_records() if plan.resume else []
    done = len(history(preset.space, records, pass_over=store.pass_over))
    others = asked_otherwise(preset.space, records)
    torch.set_num_threads(1)  # the driver only looks at layouts

    with cluster(arguments.address, verbose=arguments.verbose, inside=True):
        pool = _pool(arguments, preset)
        workers = f"{pool.num_workers}" if pool.num_workers else "as many as fit"
        print(f"{plan.trials} trials; workers of {pool.share}, {workers} at once; results in {out}", flush=True)
        if plan.resume:
            print(f"{done} of them are done", flush=True)
        if others:
            print(f"{others} trials in {out} were asked with other text, data or code: other questions, left alone")
        progress = Progress(plan.trials, count=done)
        run = Run.start("search", arguments.git_commit)
        found = search(preset.space, store, run, pool, plan, tell=progress.tell)
        with signals.deferred():
            return _conclude(store, plan, found)


def _conclude(store: Store, plan: Plan, found: Found) -> int:
    """Tells what came of it, writes the front and the report. 0 where something was measured and all that was asked was
    answered, else one line on stderr says what is in the way.

    Raises:
        KeyboardInterrupt: a signal ended the search.
    """
    print(_summary(plan, found))
    if not found.rejected.startswith("0 "):
        print(f"questions: {found.rejected}")
    for line in advantage(found.all):
        print(line)
    print(f"results: {store.root}")
    troubles = _troubles(found)
    if found.all:
        troubles += [trouble for draw in (_front, _report) if (trouble := draw(store, plan, found))]
    if found.interrupted and len(found.all) < plan.trials:
        raise KeyboardInterrupt
    if troubles:
        print(f"jobs/search.py: {'; '.join(troubles)}: mend that, and {AGAIN}", file=sys.stderr)
    elif not found.measured:
        print("jobs/search.py: no trial was measured: give it more time, or other questions", file=sys.stderr)
    return 0 if found.measured and not troubles else FAILED


def _summary(plan: Plan, found: Found) -> str:
    pruned = sum(record.status == "pruned" for record in found.all)
    failed = len(found.all) - len(found.measured)
    return "".join(
        (
            f"{len(found.measured)} of {plan.trials} trials measured",
            f" ({pruned} stopped early)" if pruned else "",
            f", {failed} failed" if failed else "",
            f"; the search ended early: {found.ended}" if found.ended else "",
        )
    )


def _troubles(found: Found) -> list[str]:
    """What kept the search from an answer to all that was asked, for reasons outside of its questions."""
    troubles = [found.trouble] if found.trouble else []
    if found.unwritten:
        troubles.append(f"{len(found.unwritten)} trials that were measured could not be written")
    if outside := found.unanswered:
        error = " ".join((outside[-1].error or "").split())[:200]
        troubles.append(f"{len(outside)} trials failed for reasons outside of them, the last: {error}")
    return troubles


def _front(store: Store, plan: Plan, found: Found) -> str | None:
    """Writes the front; returns why it could not, or why there is none."""
    goals = ", ".join(map(str, plan.objectives))
    try:
        front = write_front(store, found.all, plan.objectives)
    except OSError as error:
        return f"the front could not be written: {error}"
    print(f"{len(front)} on the Pareto front of {goals}")
    for line in left_out(found.all, plan.objectives):
        print(line)
    if front:
        print(f"front:   {front[0]}{' ...' if len(front) > 1 else ''}")
    return None if front or not found.measured else f"no trial is on the front of {goals}"


def _report(store: Store, plan: Plan, found: Found) -> str | None:
    """Writes the report; returns why it could not."""
    if "://" in store.root:
        print(f"report:  python -m dashboards.report {shlex.quote(store.root)} --out report.html")
        return None
    try:
        print(f"report:  {write_own_report(store.root)}")
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _dry_run(arguments: argparse.Namespace, preset: Preset, plan: Plan, store: Store) -> int:
    records = store.read_asked()
    earlier = history(preset.space, records) if plan.resume else []
    torch.set_num_threads(1)
    workers = arguments.workers or os.cpu_count() or 1
    for line in dry_run(preset.space, plan, earlier, records, workers, store.read_series()):
        print(line)
    return 0


def _again(arguments: argparse.Namespace) -> int:
    """Asks one question once more, exactly as it was asked."""
    with refusing():
        Share(arguments.cpus_per_worker, arguments.gpus_per_worker or 0)
        spec, before = read_best(arguments.again)
        store = Store.create(absolute("--out", arguments.out), adopt=arguments.adopt)
    with cluster(arguments.address, verbose=arguments.verbose):
        share = worker_share(arguments.cpus_per_worker, arguments.gpus_per_worker)
        limits = {"wait_s": arguments.wait, "trial_s": arguments.limit}
        with coordinator_of(spec.ranks.world_size, share, **limits) as coordinator:
            record = run_trial(spec, coordinator, Run.start("again", arguments.git_commit), store=store)
    print(summary(record))
    print(f"the search had {', '.join(f'{name} {value:.4g}' for name, value in before.items())}")
    print(f"results: {store.root}")
    return 0 if record.status == "ok" else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="results folder or pyarrow.fs URI; absolute in a submitted job")
    add_adopt(parser)
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--space", type=expanduser, help=f"{', '.join(SPACES)}, or a YAML file (the preset's)")
    parser.add_argument("--per-layer", action="store_true", help="also ask questions whose layers differ")
    parser.add_argument("--papers", action="store_true", help="first ask the papers' BigBird, window and sink + window")
    parser.add_argument("--trials", "--max-trials", type=at_least(1), help="how many in all (the preset's number)")
    parser.add_argument("--time-budget", type=_seconds, default=math.inf, help="no trial begins later: 90s, 10m, 2h")
    parser.add_argument("--dry-run", action="store_true", help="list what would run, with predicted costs, and end")
    parser.add_argument("--resume", action="store_true", help="go on from the trials of this search in --out")
    parser.add_argument(
        "--again",
        type=expanduser,
        metavar="BEST_JSON",
        help="ask one point's question once more, and nothing else",
    )
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="tpe")
    parser.add_argument("--early-stopping", action="store_true", help="stop what falls behind others of its density")
    parser.add_argument("--screening", action="store_true", help="do not train what is predicted to be far beaten")
    parser.add_argument(
        "--previews",
        type=int,
        default=0,
        metavar="N",
        help="look at N questions with the dense baseline's weights for each one that is trained (0: train all)",
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--distance", type=int, help="task recall with pairs so many tokens apart, instead of text")
    task.add_argument("--captured", metavar="QKV.PT", help="keep the attention of a model's own q, k, v instead")
    task.add_argument("--module", metavar="FILE:FUNCTION", help="your own torch module, data and loss: docs/search.md")
    task.add_argument("--text", help="file or folder to train on (the Python standard library's sources)")
    parser.add_argument(
        "--objectives",
        default="quality,latency,memory",
        help=f"comma-separated: quality, {', '.join(COSTS)}, with bounds as in latency<=2ms (quality,latency,memory)",
    )
    parser.add_argument("--seed", type=seed, default=0)
    for size, kind in SIZES.items():
        parser.add_argument(f"--{size.replace('_', '-')}", type=kind, help="instead of the preset's")
    parser.add_argument("--address", help="a running Ray cluster (RAY_ADDRESS, else one of our own)")
    parser.add_argument(
        "--workers", type=at_least(1), help="trials at once (as many as fit, also while the cluster grows or shrinks)"
    )
    parser.add_argument("--cpus-per-worker", type=positive, default=1, help="whole ones, or a fraction of one (1)")
    parser.add_argument(
        "--gpus-per-worker", type=not_negative, help="a GPU, a share of one, or 0 (one where the cluster has any now)"
    )
    parser.add_argument("--wait", type=not_negative, default=60.0, help="seconds to wait for resources")
    parser.add_argument("--limit", type=positive, default=1800.0, help="seconds that one trial may take")
    parser.add_argument("--verbose", action="store_true", help="print events too, a line of key=value each")
    parser.add_argument("--git-commit", default=git_commit(Path(__file__).parent), help="recorded with each trial")
    return parser.parse_args()


def _preset(arguments: argparse.Namespace) -> Preset:
    """The named preset with what the command line changes."""
    preset = PRESETS[arguments.preset]
    base = preset.space.base
    sizes: dict[str, Any] = {size: value for size in SIZES if (value := getattr(arguments, size)) is not None}
    if arguments.module is not None:
        base = _own_question(arguments.module, replace(base, seed=arguments.seed), sizes)
    elif arguments.captured is not None:
        base = question_of(absolute("--captured", arguments.captured), base)
    elif arguments.distance is not None:
        base = replace(base, task="recall", task_params={"distance": arguments.distance})
    else:
        text = None if arguments.text is None else absolute("--text", arguments.text)
        base = replace(base, task_params={**base.task_params, "text": text})
    base = replace(base, seed=arguments.seed, **sizes)
    trials = preset.trials if arguments.trials is None else arguments.trials
    if base.task == "byte_lm":
        base = about_its_text(base)
    if base.task == "recall":
        recall_params(base)
    space = make_space(arguments.space, base) if arguments.space else replace(preset.space, base=base)
    if arguments.per_layer:
        space = replace(space, per_layer=True)
    if arguments.papers:
        space = replace(space, references=(*space.references, *PAPERS))
    return replace(preset, space=space, trials=trials)


def _own_question(name: str, base: TrialSpec, sizes: dict[str, Any]) -> TrialSpec:
    """The question about a module of the user's own, which brings its sizes."""
    if given := sorted(set(sizes) - {"train_steps", "learning_rate"}):
        raise ValueError(f"--module brings its own sizes, got {', '.join(given)} beside it")
    file, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(f"--module names a function as FILE:FUNCTION, got {name!r}")
    return question_of_module(f"{absolute('--module', file)}:{function}", base)


def _plan(arguments: argparse.Namespace, preset: Preset) -> Plan:
    return Plan(
        preset.trials,
        named_objectives(arguments.objectives.split(","), QUALITIES[preset.space.base.task][1]),
        algorithm=arguments.algorithm,
        seed=arguments.seed,
        time_budget_s=arguments.time_budget,
        early_stopping=arguments.early_stopping,
        screening=arguments.screening,
        previews=arguments.previews,
        resume=arguments.resume,
    )


def _pool(arguments: argparse.Namespace, preset: Preset) -> Pool:
    """A worker a GPU; on a cluster without GPUs a worker a CPU share; or as asked. As many as fit, which may change, or
    as asked."""
    share = worker_share(arguments.cpus_per_worker, arguments.gpus_per_worker)
    return Pool(share, arguments.workers, wait_s=arguments.wait, trial_s=arguments.limit, timing=preset.timing)


def _seconds(text: str) -> float:
    """``90``, ``90s``, ``10m`` or ``2h`` in seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"a positive duration like 90s, 10m or 2h was wanted, got {text!r}")
    return seconds


if __name__ == "__main__":
    with (
        interruptible(AGAIN),
        ending(FAILED, ValueError, OSError, NotImplementedError, TooFewResources, WorkerNotMade),
        ending(BAD_INPUT, NoCluster),
    ):
        sys.exit(main())
