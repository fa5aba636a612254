"""How fast is block-sparse attention here, beside torch's dense SDPA, and how exact?

    python jobs/benchmark.py --suite cpu --out results/benchmark
    python jobs/benchmark.py --suite ring --out results/ring        # ring attention on 1, 2 and 4 ranks of this host
    python jobs/benchmark.py --suite scaling --out results/scaling  # on all GPUs of this host, else on its cores
    python jobs/benchmark.py --suite gpu --peers --out results/gpu  # our kernels beside other libraries' on one GPU
    python jobs/benchmark.py --pattern bigbird --density 0.1 0.05 --lengths 4096 16384 --out results/bigbird
    python jobs/benchmark.py --variant distributed --world-size 1 2 --causal --out results/actors  # Ray actors as ranks
    ray job submit --working-dir . -- python jobs/benchmark.py --suite cpu --out /absolute/results

Each row times own and dense attention in turn on one device; a row of a ring its steps and those of one rank with the
whole sequence. Compare speeds on a quiet machine. The suites ``gpu``, ``ring`` and ``scaling`` need no
Ray (``scaling`` leaves out its recovery without it). A ``gpu`` run goes on
where an earlier one in the same folder ended.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from raybsa import patterns, signals
from raybsa.events import show
from raybsa.experiments import peer_table
from raybsa.experiments.options import (
    add_adopt,
    at_least,
    backend,
    name_or_json,
    not_negative,
    positive,
    regex,
    seed,
)
from raybsa.experiments.peer_cells import cells, parts_of
from raybsa.experiments.peer_rows import rows_of
from raybsa.experiments.peer_suite import PeerSuite
from raybsa.experiments.place import BAD_INPUT, FAILED, absolute, ending, git_commit, interruptible, refusing
from raybsa.experiments.recording import Run, record_of, write
from raybsa.experiments.scaling_run import LIMIT_S, Scaled, measure_scaling
from raybsa.experiments.suites import BASE, RING_GPU, SUITES, grid, on_ranks
from raybsa.experiments.table import head_line, line, ring_head_line, ring_line
from raybsa.results.record import Outcome, Record
from raybsa.results.store import Store
from raybsa.ring.partition import STRATEGIES
from raybsa.spec import DISTRIBUTED, TrialSpec
from raybsa.tasks.attention import VARIANTS
from raybsa.tasks.peers import GpuLost
from raybsa.tasks.ring import ring_params
from raybsa.tasks.ring_rank import Answer
from raybsa.tasks.ring_ranks import measure_rings

FORECAST_RANKS = 1024
GPU, SCALING = "gpu", "scaling"


def main() -> int:
    arguments = _arguments()
    if arguments.suite == GPU:
        return _gpu(arguments)
    if arguments.suite == SCALING:
        return _scaling(arguments)
    with refusing():
        specs = _specs(arguments)
        out = absolute("--out", arguments.out)
        store = Store.create(out, adopt=arguments.adopt)
    if arguments.verbose:
        show()
    run = Run.start("benchmark", arguments.git_commit)
    records: list[Record] = []
    measure = _speeds if specs[0].task != "ring" else _rings if arguments.suite else _actors
    try:
        for record in measure(specs, arguments, run, store):
            records.append(record)
    except KeyboardInterrupt:
        print(f"ended after {len(records)} of {len(specs)} measurements")
    print(f"results: {out}")
    if any(record.status == "ok" for record in records):
        _report(out)
    if len(records) < len(specs):
        return signals.exit_code()
    return 0 if all(record.status == "ok" for record in records) else 1


def _speeds(specs: list[TrialSpec], arguments: argparse.Namespace, run: Run, store: Store) -> Iterator[Record]:
    """Attention beside dense attention, on one worker of Ray."""
    from raybsa.cluster.coordinator import Coordinator, WorkerNotMade
    from raybsa.cluster.resources import TooFewResources
    from raybsa.experiments.launch import NoCluster, cluster, worker_share
    from raybsa.experiments.trial import run_trial

    with (
        ending(FAILED, TooFewResources, WorkerNotMade),
        ending(BAD_INPUT, NoCluster),
        cluster(arguments.address, verbose=arguments.verbose),
    ):
        share = worker_share(arguments.threads)
        timing = {"repeats": arguments.repeats, "budget_s": arguments.budget}
        print(f"{len(specs)} measurements on {share}, results in {store.root}", flush=True)
        print(head_line())
        with Coordinator(share, wait_s=arguments.wait, trial_s=arguments.limit, timing=timing) as coordinator:
            for number, spec in enumerate(specs):
                record = run_trial(spec, coordinator, run, trial_id=run.trial_id(number), store=store)
                print(line(record), flush=True)
                yield record


def _rings(specs: list[TrialSpec], arguments: argparse.Namespace, run: Run, store: Store) -> Iterator[Record]:
    """The ring on processes of this host, one a rank. Needs no Ray."""
    print(f"{len(specs)} measurements on ranks of this host, results in {store.root}", flush=True)
    print(ring_head_line(), flush=True)
    answers = measure_rings(specs, repeats=arguments.repeats, budget_s=arguments.budget)
    yield from _ring_records(answers, run, store)


def _actors(specs: list[TrialSpec], arguments: argparse.Namespace, run: Run, store: Store) -> Iterator[Record]:
    """The ring on Ray actors, one a rank."""
    from raybsa.cluster.resources import TooFewResources
    from raybsa.cluster.rings import measure_rings_on_actors
    from raybsa.experiments.launch import NoCluster, cluster, worker_share

    threads = arguments.threads or 1
    with (
        ending(FAILED, TooFewResources),
        ending(BAD_INPUT, NoCluster),
        cluster(arguments.address, num_cpus=threads * max(arguments.world_size), verbose=arguments.verbose),
    ):
        share = worker_share(threads)
        print(f"{len(specs)} measurements on actors of {share} each, results in {store.root}", flush=True)
        print(ring_head_line(), flush=True)
        answers = measure_rings_on_actors(
            specs,
            share,
            wait_s=arguments.wait,
            limit_s=arguments.limit,
            repeats=arguments.repeats,
            budget_s=arguments.budget,
        )
        yield from _ring_records(answers, run, store)


def _ring_records(answers: Iterable[tuple[TrialSpec, Answer]], run: Run, store: Store) -> Iterator[Record]:
    for number, (spec, answer) in enumerate(answers):
        measured, error = (None, answer) if isinstance(answer, str) else (answer, None)
        outcome = Outcome(spec, measured, error, 0)
        record = record_of(outcome, run, run.trial_id(number))
        write(store, record, outcome)
        print(ring_line(record), flush=True)
        yield record


def _gpu(arguments: argparse.Namespace) -> int:
    """Our kernels beside other libraries' on one GPU. Needs no Ray."""
    timing = {"repeats": arguments.repeats, "budget_s": arguments.budget}
    with refusing():
        whole = cells(quick=arguments.quick)
        if not any(arguments.only.search(cell.name) for cell in whole):
            among = f"{len(whole)} cells, as {whole[0].name!r}"
            raise ValueError(f"--only {arguments.only.pattern!r} finds none of {among}")
        asked = [cell for cell in parts_of(whole, *arguments.part) if arguments.only.search(cell.name)]
        out = absolute("--out", arguments.out)
        store, run = Store.create(out, adopt=arguments.adopt), Run.start("benchmark", arguments.git_commit)
        suite = PeerSuite(asked, store, run, peers=arguments.peers, time_budget_s=arguments.time_budget, **timing)
    print(f"{len(asked)} cells, results in {out}", flush=True)
    ended, code = None, 0
    try:
        for cell, records in suite.records():
            print(*map(peer_table.line_of, rows_of(records, [cell])), flush=True)
    except GpuLost as error:
        ended, code = str(error), FAILED
    except KeyboardInterrupt:
        ended, code = f"ended by {signals.heard().name}", signals.exit_code()
    _report(out)
    print(f"results: {out}\n{peer_table.text_of(rows_of(store.read_records(), cells()))}")
    if suite.left or ended:
        print(
            f"{ended or 'the time budget ended'}: the same command goes on with {len(suite.left) or 'the'} cells left"
        )
    return code


def _scaling(arguments: argparse.Namespace) -> int:
    """The ring on 1, 2, 4 and 8 ranks of this host beside torch's rings. Needs Ray for the recovery alone."""
    with refusing():
        out = absolute("--out", arguments.out)
        store = Store.create(out, adopt=arguments.adopt)
    limit_s = arguments.time_budget or LIMIT_S
    timing = {"repeats": arguments.repeats, "budget_s": arguments.budget}
    scaled = measure_scaling(
        store, arguments.git_commit, quick=arguments.quick, limit_s=limit_s, say=partial(print, flush=True), **timing
    )
    _report(out)
    _draw_forecast(scaled, out)
    print(f"results: {out}\n{scaled.words}")
    return 0 if scaled.good else 1


def _draw_forecast(scaled: Scaled, out: str) -> None:
    """Draws the scaling forecast with the measured points in it, where Plotly is installed."""
    if "://" in out or scaled.hardware is None:
        return
    try:
        from dashboards.measured_forecast import measured_part, write_forecast
        from dashboards.written import free_path
    except ImportError as error:
        print(f"forecast: not drawn ({error})")
        return
    path = free_path(os.path.join(out, "forecast.html"))
    write_forecast(path, scaled.compared, [measured_part(scaled.ring_rows, scaled.hardware, FORECAST_RANKS)])
    print(f"forecast: {path}")


def _report(out: str) -> None:
    """Draws a local folder's report, where Plotly is installed."""
    if "://" in out:
        return
    try:
        from dashboards.report import write_own_report
    except ImportError as error:
        print(f"report:  not drawn ({error})")
        return
    print(f"report:  {write_own_report(out)}")


def _specs(arguments: argparse.Namespace) -> list[TrialSpec]:
    if arguments.suite:
        specs = SUITES[arguments.suite]()
        if arguments.suite == RING_GPU:
            gpus, ranks = torch.cuda.device_count(), max(ring_params(spec)[0] for spec in specs)
            if gpus < ranks:
                raise ValueError(f"the {RING_GPU} suite needs {ranks} CUDA devices, this machine has {gpus}")
        return specs
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
    specs = grid(
        base,
        variants=arguments.variant,
        patterns=[patterns.build(given).spec for given in arguments.pattern],
        lengths=arguments.lengths,
        densities=arguments.density,
        block_size=arguments.block_size,
        backend=arguments.backend,
    )
    if DISTRIBUTED not in arguments.variant:
        return specs
    if arguments.variant != [DISTRIBUTED]:
        raise ValueError(f"--variant {DISTRIBUTED} is measured alone, got {' '.join(arguments.variant)}")
    return on_ranks([*product(specs, arguments.partition)], arguments.world_size)


def _part(text: str) -> tuple[int, int]:
    """``2/3``: the second of three parts."""
    part, _, parts = text.partition("/")
    try:
        return int(part), int(parts or 1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a part is I/N, as 2/3, got {text!r}") from error


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="results folder or pyarrow.fs URI; absolute in a submitted job")
    add_adopt(parser)
    parser.add_argument(
        "--suite", choices=[*SUITES, GPU, SCALING], help="a named set of measurements, instead of the options below"
    )
    parser.add_argument("--variant", nargs="+", default=["base"], choices=VARIANTS)
    parser.add_argument(
        "--pattern", type=name_or_json, nargs="+", default=["random"], help="names, module:Class or JSON specs"
    )
    parser.add_argument("--density", nargs="+", type=float, default=[0.1])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--backend", type=backend, default="auto")
    parser.add_argument(
        "--error-len", type=at_least(0), default=1024, help="tokens at which errors are measured; 0: nowhere"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--repeats", type=at_least(1), default=20, help="timed calls of each side (5 where they are slow)"
    )
    parser.add_argument("--budget", type=positive, default=5.0, help="seconds for the timed calls of each side")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads of the worker (all of the largest machine's)")
    parser.add_argument("--address", help="a running Ray cluster (RAY_ADDRESS, else one of our own)")
    parser.add_argument("--wait", type=not_negative, default=60.0, help="seconds to wait for resources")
    parser.add_argument("--limit", type=positive, default=1800.0, help="seconds that one measurement may take")
    gpu = parser.add_argument_group("suites gpu and scaling")
    gpu.add_argument("--peers", action="store_true", help="also FlexAttention, FA4 and cuDNN where installed")
    gpu.add_argument("--quick", action="store_true", help="a few small cells")
    gpu.add_argument("--only", type=regex, default="", metavar="REGEX", help="cells whose name it finds")
    gpu.add_argument("--part", type=_part, default="1/1", metavar="I/N", help="one of N runs that share the cells")
    gpu.add_argument(
        "--time-budget",
        type=positive,
        metavar="SECONDS",
        help=f"for cells; what is left is named (scaling: {LIMIT_S:.0f}, with all else)",
    )
    ring = parser.add_argument_group(f"variant {DISTRIBUTED}")
    ring.add_argument(
        "--world-size", nargs="+", type=at_least(1), default=[2], help="ranks; each actor has --threads CPUs (1)"
    )
    ring.add_argument("--partition", nargs="+", default=["balanced"], choices=STRATEGIES)
    parser.add_argument("--verbose", action="store_true", help="print events too, a line of key=value each")
    parser.add_argument("--git-commit", default=git_commit(Path(__file__).parent), help="recorded with each row")
    return parser.parse_args()


if __name__ == "__main__":
    with (
        interruptible("what ended is in --out; the same command measures all of it again"),
        ending(FAILED, ValueError, TypeError, OSError),
    ):
        sys.exit(main())
