"""Does the front of a search hold on fresh data, with more seeds and longer training?

    python jobs/validate.py results/search --out results/validated --seeds 3 --longer 2
    ray job submit --working-dir . -- python jobs/validate.py /shared/results --out /shared/validated

Every point of the front is trained and timed again; those that do not hold are flagged. ``validation.json`` in --out
has the verdicts; the new trials lie beside it as records.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from raybsa.cluster.coordinator import WorkerNotMade
from raybsa.cluster.resources import Share, TooFewResources
from raybsa.cluster.ring_coordinator import coordinator_of
from raybsa.experiments.front import front_objectives
from raybsa.experiments.keeping import keep
from raybsa.experiments.launch import NoCluster, cluster, room_for, worker_share
from raybsa.experiments.options import add_adopt, at_least, not_negative, positive
from raybsa.experiments.place import BAD_INPUT, FAILED, absolute, ending, git_commit, interruptible, refusing
from raybsa.experiments.progress import Progress
from raybsa.experiments.recording import Run
from raybsa.experiments.validation import Verdict, questions, verdicts
from raybsa.results.pareto import Objective, named_objectives, pareto_front
from raybsa.results.record import Record, spec_of
from raybsa.results.store import Store


def main() -> int:
    arguments = _arguments()
    with refusing():
        Share(arguments.cpus_per_worker, arguments.gpus_per_worker or 0)
        points, objectives = _front(arguments)
        specs = questions(points, arguments.seeds, arguments.longer)
        store = Store.create(absolute("--out", arguments.out), adopt=arguments.adopt)
    run = Run.start("validate", arguments.git_commit)
    found: list[Record] = []
    with cluster(arguments.address, verbose=arguments.verbose):
        share = worker_share(arguments.cpus_per_worker, arguments.gpus_per_worker)
        workers = arguments.workers or max(1, min(len(specs), room_for(share)))
        print(f"{len(points)} points, {len(specs)} trials on {workers} worker(s) of {share}", flush=True)
        progress = Progress(len(specs))
        limits = {"wait_s": arguments.wait, "trial_s": arguments.limit}
        for size in sorted({spec.ranks.world_size for spec in specs}):
            with coordinator_of(size, share, num_workers=workers, **limits) as coordinator:
                for outcome in coordinator.map(spec for spec in specs if spec.ranks.world_size == size):
                    record = keep(store, outcome, run, run.trial_id(len(found)))
                    found.append(record)
                    progress.tell(record)
    judged = verdicts(points, found, objectives)
    for verdict in judged:
        print(_line(verdict, objectives))
    content = json.dumps([_data(verdict, objectives) for verdict in judged], indent=2, allow_nan=False)
    held = sum(verdict.why_not is None for verdict in judged)
    print(
        f"{held} of {len(judged)} points hold: {store.write_file(store.free_name('validation.json'), content.encode())}"
    )
    if failed := [record for record in found if record.status != "ok"]:
        print(f"{len(failed)} of {len(found)} trials failed, the last: {failed[-1].error}", file=sys.stderr)
    return FAILED if failed else 0


def _front(arguments: argparse.Namespace) -> tuple[list[Record], list[Objective]]:
    """The points to measure again and what they were measured by."""
    store = Store(absolute("RESULTS", arguments.results))
    records = _of_the_newest_content(store.read_asked())
    goal = next((record.quality_goal for record in records if record.quality_goal), None)
    texts = arguments.objectives.split(",") if arguments.objectives else front_objectives(store)
    objectives = named_objectives(texts, "max" if goal == "max" else "min" if goal else None)
    front = pareto_front(records, objectives)
    if not front:
        raise ValueError(f"a search with a Pareto front was wanted, found none under {arguments.results!r}")
    if len({(record.task, record.seq_len, record.train_len, record.device_name) for record in front}) > 1:
        raise ValueError(f"the results of one search were wanted, got several questions under {arguments.results!r}")
    return front, objectives


def _of_the_newest_content(records: list[Record]) -> list[Record]:
    """The trials that were asked about the text, data and code of the last one that measured a quality, by densities as
    they are now."""
    records = [record for record in records if spec_of(record).is_current]
    contents = [spec_of(record).content for record in records]
    judged = [content for record, content in zip(records, contents, strict=True) if record.quality_goal]
    return [r for r, content in zip(records, contents, strict=True) if not judged or content == judged[-1]]


def _line(verdict: Verdict, objectives: list[Objective]) -> str:
    name = f"{verdict.record.pattern} {verdict.record.density:.1%} block {verdict.record.block_size}"
    changes = (
        f"{objective.name} {before:.4g} -> {after:.4g} ± {spread:.2g}"
        for objective, before, after, spread in zip(
            objectives, verdict.before, verdict.after, verdict.spread, strict=True
        )
    )
    return f"{'holds' if verdict.why_not is None else 'DOES NOT HOLD':<14}{name}: {', '.join(changes)}" + (
        f" ({verdict.why_not})" if verdict.why_not else ""
    )


def _data(verdict: Verdict, objectives: list[Objective]) -> dict[str, object]:
    names = [objective.name for objective in objectives]
    numbers = {"before": verdict.before, "after": verdict.after, "spread": verdict.spread}
    return {
        "trial_id": verdict.record.trial_id,
        "spec": json.loads(verdict.record.spec),
        "holds": verdict.why_not is None,
        "why_not": verdict.why_not,
        **{key: dict(zip(names, map(_finite, values), strict=True)) for key, values in numbers.items()},
    }


def _finite(value: float) -> float | None:
    """JSON has no word for a number that is none."""
    return value if math.isfinite(value) else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", metavar="RESULTS", help="folder or pyarrow.fs URI of a search")
    parser.add_argument("--out", required=True, help="folder for the new trials; absolute in a submitted job")
    add_adopt(parser)
    parser.add_argument("--objectives", help="instead of those of the search")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="new trials a point (3)")
    parser.add_argument("--longer", type=positive, default=2.0, help="times the training steps of the search (2)")
    parser.add_argument("--address", help="a running Ray cluster (RAY_ADDRESS, else one of our own)")
    parser.add_argument("--workers", type=at_least(1), help="trials at once")
    parser.add_argument("--cpus-per-worker", type=positive, default=1, help="whole ones, or a fraction of one (1)")
    parser.add_argument(
        "--gpus-per-worker", type=not_negative, help="a GPU, a share of one, or 0 (one where the cluster has any now)"
    )
    parser.add_argument("--wait", type=not_negative, default=60.0, help="seconds to wait for resources")
    parser.add_argument("--limit", type=positive, default=3600.0, help="seconds that one trial may take")
    parser.add_argument("--verbose", action="store_true", help="print events too, a line of key=value each")
    parser.add_argument("--git-commit", default=git_commit(Path(__file__).parent), help="recorded with each trial")
    return parser.parse_args()


if __name__ == "__main__":
    with (
        interruptible("the trials that ended are in --out; the same command asks all of them again"),
        ending(FAILED, ValueError, OSError, TooFewResources, WorkerNotMade),
        ending(BAD_INPUT, NoCluster),
    ):
        sys.exit(main())
