"""Train a small byte-level transformer whose sequence is split across Ray actors; go on when some are lost.

    python jobs/train.py --out results/train --world-size 2 --pattern bigbird --density 0.2 --steps 200
    ray job submit --working-dir . -- python jobs/train.py --out /absolute/results --world-size 8 --spares 1

Every rank owns a GPU where the cluster has any, else a share of the CPUs. Checkpoints go to OUT/checkpoints; --resume
goes on from the newest one. The record and its curves (loss, recoveries) are rows of OUT, as every other job's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from os.path import expanduser
from pathlib import Path

from ray.exceptions import RayError

from raybsa import patterns
from raybsa.cluster.checkpoint import folder_for
from raybsa.cluster.journal import TrainingFailed, TrainingResult
from raybsa.cluster.member import ON_CHECKPOINT_ERROR, MemberSettings, checkpoint_question
from raybsa.cluster.resources import Share, TooFewResources
from raybsa.cluster.trace import Trace
from raybsa.cluster.training import TrainingCoordinator, require_ring
from raybsa.experiments.launch import NoCluster, cluster, worker_share
from raybsa.experiments.options import (
    add_adopt,
    at_least,
    backend,
    name_or_json,
    not_negative,
    positive,
    seed,
)
from raybsa.experiments.place import BAD_INPUT, FAILED, absolute, ending, git_commit, interruptible, refusing
from raybsa.experiments.recording import Run
from raybsa.experiments.trained import write_training
from raybsa.gradients.catalog import build
from raybsa.results.store import Store, StoreError
from raybsa.spec import ADAPTIVE, AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.byte_lm import about_its_text
from raybsa.variants.distributed import DistributedConfig

AGAIN = "the same command with --resume goes on from the newest checkpoint"


def main() -> int:
    arguments = _arguments()
    with refusing():
        Share(arguments.cpus, arguments.gpus or 0)
        spec, settings, out = _question(arguments)
        spec = about_its_text(spec)
        Store.create(out, adopt=arguments.adopt)
    run = Run.start("train", arguments.git_commit or git_commit(Path(__file__).parent))
    settings = replace(settings, labels=run.labels(0), checkpoints=_checkpoints(arguments, spec, settings, run))
    with cluster(arguments.address, verbose=arguments.verbose):
        share = worker_share(arguments.cpus, arguments.gpus)
        print(f"{arguments.world_size} ranks and {arguments.spares} spares of {share}, results in {out}", flush=True)
        with TrainingCoordinator(
            spec,
            share,
            world_size=arguments.world_size,
            spares=arguments.spares,
            min_ranks=arguments.min_ranks,
            settings=settings,
            heartbeat_s=arguments.heartbeat,
            wait_s=arguments.wait,
            grace_s=arguments.grace,
            tell=lambda step, loss: print(f"step {step}/{spec.train_steps}: {loss:.4f} nats a byte", flush=True),
            say=lambda text: print(text, flush=True),
        ) as coordinator:
            result = coordinator.run(resume=arguments.resume, stretch=arguments.tell_every)
        print(f"{_summary(result)}\nresults: {out}")
        try:  # within the cluster, which counts the record; the folder is made again where it has gone
            write_training(Store.create(out), run, 0, spec, settings, share.device, result)
        except OSError as error:
            raise StoreError(f"the training is done, but has no record: {error}: mend that, and {AGAIN}") from error
    if settings.trace:
        print(f"profile: {settings.trace.folder}, for chrome://tracing or ui.perfetto.dev")
    return 0


def _summary(result: TrainingResult) -> str:
    kinds = [f"{size / 2**20:.1f} MiB of {kind}" for kind, size in sorted(result.sent.items()) if size > 2**20 / 20]
    return (
        f"{result.bits_per_byte:.4f} bits per held-out byte after {len(result.losses)} steps on {result.world_size} "
        f"ranks in {result.train_seconds:.1f} s, {len(result.recoveries)} recoveries; a rank sent {', '.join(kinds)}; "
        f"{result.overlap.share:.0%} of the gradients' time under way lay within backward"
    )


def _question(arguments: argparse.Namespace) -> tuple[TrialSpec, MemberSettings, str]:
    attention = AttentionSpec(
        "distributed", PatternSpec(arguments.pattern), arguments.density, arguments.block_size, arguments.backend
    )
    spec = TrialSpec(
        "byte_lm",
        (attention,),
        seq_len=arguments.tokens,
        train_len=arguments.tokens,
        train_steps=arguments.steps,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        head_dim=arguments.head_dim,
        dtype=arguments.dtype,
        seed=arguments.seed,
        task_params={"text": arguments.text, "train_batch": arguments.batch},
    )
    if arguments.pattern != ADAPTIVE:
        patterns.build(arguments.pattern)
    sizes = {"spares": arguments.spares, "min_ranks": arguments.min_ranks, "heartbeat_s": arguments.heartbeat}
    require_ring(arguments.world_size, **sizes)
    out = absolute("--out", arguments.out)
    settings = MemberSettings(
        DistributedConfig(partition=arguments.partition),
        codec=build(arguments.codec).spec,
        warmup_steps=arguments.warmup,
        bucket_bytes=max(1, round(arguments.bucket_mib * 2**20)),
        overlap=not arguments.no_overlap,
        num_threads=arguments.cpus,
        checkpoints=f"{out}/checkpoints",
        checkpoint_every=arguments.checkpoint_every,
        on_checkpoint_error=arguments.on_checkpoint_error,
        verbose=arguments.verbose,
        trace=_trace(arguments, out),
    )
    return spec, settings, out


def _checkpoints(arguments: argparse.Namespace, spec: TrialSpec, settings: MemberSettings, run: Run) -> str:
    """Where this training's go: never over those of another."""
    root, question = settings.checkpoints or "", checkpoint_question(spec, settings)
    return folder_for(root, question, run.run_id, resume=arguments.resume)


def _trace(arguments: argparse.Namespace, out: str) -> Trace | None:
    if arguments.profile is None:
        return None
    if not 0 <= arguments.profile < arguments.steps:
        raise ValueError(f"--profile wants a step of 0 to {arguments.steps - 1}, got {arguments.profile}")
    return Trace(f"{out}/profile", arguments.profile)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="results/train", help="results folder or URI")
    add_adopt(parser)
    parser.add_argument("--address", help="Ray cluster; default: RAY_ADDRESS, else one of our own")
    parser.add_argument("--world-size", type=int, default=2, help="ranks that share a sequence")
    parser.add_argument("--spares", type=int, default=0, help="warm workers that wait for a loss")
    parser.add_argument("--min-ranks", type=int, default=1, help="the fewest ranks to go on with")
    parser.add_argument("--cpus", type=at_least(1), default=1, help="CPUs a rank")
    parser.add_argument(
        "--gpus", type=not_negative, help="a GPU a rank, a share of one, or 0 (one where the cluster has any now)"
    )
    parser.add_argument("--wait", type=not_negative, default=60.0, help="seconds to wait for resources")
    parser.add_argument("--heartbeat", type=float, default=2.0, help="seconds of silence after which a rank is lost")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in OUT")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument(
        "--on-checkpoint-error",
        choices=ON_CHECKPOINT_ERROR,
        default="continue",
        help="where a checkpoint cannot be written: train on, or end",
    )
    parser.add_argument(
        "--grace", type=positive, default=25.0, help="seconds for a last checkpoint after SIGTERM, SIGHUP or Ctrl-C"
    )
    parser.add_argument("--tell-every", type=at_least(1), default=20, help="steps between lines of progress")
    parser.add_argument(
        "--pattern", default="bigbird", help="a family of raybsa.patterns, module:Class, or adaptive: learned"
    )
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--backend", type=backend, default="auto")
    parser.add_argument(
        "--codec",
        type=name_or_json,
        default="none",
        help="how gradients travel: none, fp16, int8, powersgd ... or JSON",
    )
    parser.add_argument("--warmup", type=int, default=0, help="steps at the start whose gradients go uncompressed")
    parser.add_argument("--bucket-mib", type=positive, default=1.0, help="gradients that travel in one message")
    parser.add_argument("--no-overlap", action="store_true", help="send gradients after backward, not while it runs")
    parser.add_argument("--partition", default="balanced", help="balanced, contiguous, zigzag or striped")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument(
        "--text", type=expanduser, help="file or folder; default: the Python standard library's sources"
    )
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--verbose", action="store_true", help="print each rank's events, a line of key=value each")
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=5,
        metavar="STEP",
        help="write Chrome traces of this step to OUT/profile (step 5)",
    )
    parser.add_argument("--git-commit", default="", help="of the code that runs, where an uploaded copy has no .git")
    return parser.parse_args()


if __name__ == "__main__":
    with (
        interruptible(AGAIN),
        ending(FAILED, OSError, TooFewResources, TrainingFailed, RayError),
        ending(BAD_INPUT, NoCluster),
    ):
        sys.exit(main())
