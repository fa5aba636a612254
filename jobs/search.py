"""Which block-sparse pattern gives the best quality for its cost on this text and this machine?

    python jobs/search.py --out results/search --preset quick
    ray job submit --working-dir . -- python jobs/search.py --out /absolute/results --text /absolute/text

Run directly it uses a Ray cluster of its own (or the one of --address); submitted, the cluster it was submitted to.
Every trial is in --out as soon as it ends, the report is written last.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dashboards.report import write_report
from raybsa.cluster.resources import TooFewResources
from raybsa.experiments.launch import cluster, room_for, worker_share
from raybsa.experiments.place import absolute, git_commit
from raybsa.experiments.presets import PRESETS, Preset
from raybsa.experiments.progress import Progress
from raybsa.experiments.recording import Run
from raybsa.experiments.search import Pool, search
from raybsa.results.pareto import COSTS, named_objectives, pareto_front
from raybsa.results.store import Store
from raybsa.tasks.goals import QUALITIES
from raybsa.tasks.text import load_corpus

SIZES = ("seq_len", "train_len", "train_steps", "num_layers", "num_heads", "head_dim")


def main() -> int:
    arguments = _arguments()
    preset = _preset(arguments)
    objectives = named_objectives(arguments.objectives.split(","), QUALITIES[preset.space.base.task][1])
    out = absolute("--out", arguments.out)
    store = Store.create(out)
    load_corpus(preset.space.base.task_params["text"])

    with cluster(arguments.address):
        pool = _pool(arguments, preset)
        print(f"{preset.trials} trials on {pool.num_workers} worker(s) of {pool.share}, results in {out}", flush=True)
        progress = Progress(preset.trials)
        records = search(
            preset.space,
            store,
            Run.start("search", arguments.git_commit),
            pool,
            trials=preset.trials,
            objectives=objectives,
            seed=arguments.seed,
            tell=progress.tell,
        )

    code = 0 if len(records) == preset.trials else 128 + signal.SIGINT
    if not records:
        print("ended before a trial was measured")
        return code
    front = pareto_front(records, objectives)
    print(f"{len(records)} trials measured, {len(front)} on the Pareto front of {arguments.objectives}")
    print(f"results: {out}")
    if "://" not in out:
        print(f"report:  {write_report(out, os.path.join(out, 'report.html'), own_patterns=True)}")
    else:
        print(f"report:  python -m dashboards.report {shlex.quote(out)} --out report.html")
    return code if front else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="results folder or pyarrow.fs URI; absolute in a submitted job")
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    parser.add_argument("--trials", type=int, help="how many (the preset's number)")
    parser.add_argument("--text", help="file or folder to train on (the Python standard library's sources)")
    parser.add_argument(
        "--objectives",
        default="quality,latency,memory",
        help=f"comma-separated: quality, {', '.join(COSTS)} (quality,latency,memory)",
    )
    parser.add_argument("--seed", type=int, default=0)
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, help="instead of the preset's")
    parser.add_argument("--address", help="a running Ray cluster (RAY_ADDRESS, else one of our own)")
    parser.add_argument(
        "--workers", type=int, help="trials at once (one a GPU, or one a CPU share where there is none)"
    )
    parser.add_argument("--cpus-per-worker", type=int, default=1)
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for resources")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that one trial may take")
    parser.add_argument("--git-commit", default=git_commit(Path(__file__).parent), help="recorded with each trial")
    return parser.parse_args()


def _preset(arguments: argparse.Namespace) -> Preset:
    """The named preset with what the command line changes."""
    preset = PRESETS[arguments.preset]
    base = preset.space.base
    sizes: dict[str, Any] = {size: value for size in SIZES if (value := getattr(arguments, size)) is not None}
    text = None if arguments.text is None else absolute("--text", arguments.text)
    base = replace(base, seed=arguments.seed, task_params={**base.task_params, "text": text}, **sizes)
    trials = preset.trials if arguments.trials is None else arguments.trials
    for option, number in (("--trials", trials), ("--workers", arguments.workers)):
        if number is not None and number < 1:
            raise ValueError(f"{option} must be at least 1, got {number}")
    return replace(preset, space=replace(preset.space, base=base), trials=trials)


def _pool(arguments: argparse.Namespace, preset: Preset) -> Pool:
    """A worker a GPU; on a cluster without GPUs a worker a CPU share. Never more than there are trials."""
    share = worker_share(arguments.cpus_per_worker)
    workers = max(1, min(preset.trials, room_for(share))) if arguments.workers is None else arguments.workers
    return Pool(share, workers, wait_s=arguments.wait, trial_s=arguments.limit, timing=preset.timing)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, TooFewResources) as error:
        sys.exit(f"error: {error}")
