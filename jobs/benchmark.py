"""How fast is block-sparse attention here, beside torch's dense SDPA, and how exact?

    python jobs/benchmark.py --suite cpu --out results/benchmark
    python jobs/benchmark.py --suite ring --out results/ring        # ring attention on 1, 2 and 4 ranks of this host
    python jobs/benchmark.py --pattern bigbird --density 0.1 0.05 --lengths 4096 16384 --out results/bigbird
    ray job submit --working-dir . -- python jobs/benchmark.py --suite cpu --out /absolute/results

Each row times own and dense attention in turn on one device. Compare speeds on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dashboards.report import write_report
from raybsa import patterns
from raybsa.cluster.coordinator import Coordinator, WorkerNotMade
from raybsa.cluster.resources import TooFewResources
from raybsa.experiments.launch import cluster, worker_share
from raybsa.experiments.place import absolute, git_commit
from raybsa.experiments.recording import Run, record_of, write
from raybsa.experiments.suites import BASE, SUITES, grid
from raybsa.experiments.table import head_line, line, ring_head_line, ring_line
from raybsa.experiments.trial import run_trial
from raybsa.results.record import Outcome, Record
from raybsa.results.store import Store
from raybsa.spec import PatternSpec, TrialSpec
from raybsa.tasks.ring_ranks import measure_rings


def main() -> int:
    arguments = _arguments()
    specs = _specs(arguments)
    out = absolute("--out", arguments.out)
    store = Store.create(out)
    run = Run.start("benchmark", arguments.git_commit)
    records: list[Record] = []
    measure = _rings if specs[0].task == "ring" else _speeds
    try:
        for record in measure(specs, arguments, run, store):
            records.append(record)
    except KeyboardInterrupt:
        print(f"ended after {len(records)} of {len(specs)} measurements")
    print(f"results: {out}")
    if "://" not in out and any(record.status == "ok" for record in records):
        print(f"report:  {write_report(out, os.path.join(out, 'report.html'), own_patterns=True)}")
    if len(records) < len(specs):
        return 128 + signal.SIGINT
    return 0 if all(record.status == "ok" for record in records) else 1


def _speeds(specs: list[TrialSpec], arguments: argparse.Namespace, run: Run, store: Store) -> Iterator[Record]:
    """Attention beside dense attention, on one worker."""
    with cluster(arguments.address):
        share = worker_share(arguments.threads)
        timing = {"repeats": arguments.repeats, "budget_s": arguments.budget or 5.0}
        print(f"{len(specs)} measurements on {share}, results in {store.root}", flush=True)
        print(head_line())
        with Coordinator(share, wait_s=arguments.wait, trial_s=arguments.limit, timing=timing) as coordinator:
            for number, spec in enumerate(specs):
                record = run_trial(spec, coordinator, run, trial_id=f"{run.run_id}-{number:03d}", store=store)
                print(line(record), flush=True)
                yield record


def _rings(specs: list[TrialSpec], arguments: argparse.Namespace, run: Run, store: Store) -> Iterator[Record]:
    """The ring on processes of this host, one a rank. Needs no Ray."""
    print(f"{len(specs)} measurements on ranks of this host, results in {store.root}", flush=True)
    print(ring_head_line(), flush=True)
    answers = measure_rings(specs, repeats=arguments.repeats, budget_s=arguments.budget or 3.0)
    for number, (spec, answer) in enumerate(answers):
        measured, error = (None, answer) if isinstance(answer, str) else (answer, None)
        outcome = Outcome(spec, measured, error, 0)
        record = record_of(outcome, run, f"{run.run_id}-{number:03d}")
        write(store, record, outcome)
        print(ring_line(record), flush=True)
        yield record


def _specs(arguments: argparse.Namespace) -> list[TrialSpec]:
    if arguments.suite:
        return SUITES[arguments.suite]()
    params = {"error_len": min(arguments.error_len, *arguments.lengths)} if arguments.error_len else {}
    base = replace(
        BASE,
        batch=arguments.batch,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
        causal=arguments.causal,
        dtype=arguments.dtype,
        seed=arguments.seed,
        task_params=params,
    )
    return grid(
        base,
        variants=arguments.variant,
        patterns=[_pattern(text) for text in arguments.pattern],
        lengths=arguments.lengths,
        densities=arguments.density,
        block_size=arguments.block_size,
        backend=arguments.backend,
    )


def _pattern(text: str) -> PatternSpec:
    """A family's name, ``module:Class``, or a PatternSpec's dict as JSON."""
    given = json.loads(text) if text.lstrip().startswith("{") else text
    return patterns.build(given).spec


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="results folder or pyarrow.fs URI; absolute in a submitted job")
    parser.add_argument("--suite", choices=SUITES, help="a named set of measurements, instead of the options below")
    parser.add_argument("--variant", nargs="+", default=["base"], choices=["base", "multihead"])
    parser.add_argument("--pattern", nargs="+", default=["random"], help="names, module:Class or JSON specs")
    parser.add_argument("--density", nargs="+", type=float, default=[0.1])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--error-len", type=int, default=1024, help="tokens at which errors are measured; 0: nowhere")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each side (5 where they are slow)")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for the timed calls of each side")
    parser.add_argument("--threads", type=int, help="CPU threads of the worker (all of the largest machine's)")
    parser.add_argument("--address", help="a running Ray cluster (RAY_ADDRESS, else one of our own)")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait for resources")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that one measurement may take")
    parser.add_argument("--git-commit", default=git_commit(Path(__file__).parent), help="recorded with each row")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, TypeError, OSError, TooFewResources, WorkerNotMade) as error:
        sys.exit(f"error: {error}")
