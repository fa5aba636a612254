"""Which attention learns most of a text in the same steps, at the same density? Fixed patterns, learned ones and dense.

    python jobs/compare.py --out results/compare
    python jobs/compare.py --out results/compare --steps 6000 --device cuda --layers 4 --heads 4 --head-dim 64

Every answer is in --out as soon as it is there; the same command asks only for what is missing. Needs no Ray cluster.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from raybsa import patterns
from raybsa.experiments.compare import answer, questions, summary, training_of
from raybsa.experiments.options import add_adopt, at_least, json_object, name_or_json, seed, share
from raybsa.experiments.place import FAILED, absolute, ending, git_commit, interruptible, refusing
from raybsa.experiments.recording import Run
from raybsa.results.store import Store
from raybsa.spec import ADAPTIVE, DENSE, AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.byte_lm import about_its_text

AGAIN = "the same command asks only for what is missing"


def main() -> int:
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with refusing(NotImplementedError):
        specs = _specs(arguments)
        training_of(specs[0], arguments.device)
        store = Store.create(absolute("--out", arguments.out), adopt=arguments.adopt)
    records = []
    for record in answer(specs, arguments.device, Run.start("compare", arguments.git_commit), store):
        records.append(record)
        print(
            f"{len(records)}/{len(specs)} {record.pattern} {record.density:.2%} seed {record.seed}: "
            f"{record.quality:.4f} {record.quality_name} in {record.train_seconds:.0f} s",
            flush=True,
        )
    print("\n".join(summary(records)))
    print(f"results: {store.root}")
    return 0


def _specs(arguments: argparse.Namespace) -> list[TrialSpec]:
    base = TrialSpec(
        arguments.task,
        (AttentionSpec(DENSE),),
        seq_len=arguments.tokens,
        train_len=arguments.tokens,
        train_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        head_dim=arguments.head_dim,
        dtype=arguments.dtype,
        task_params=arguments.task_params,
    )
    if base.task == "byte_lm":
        base = about_its_text(base)
    asked = [_pattern(given, arguments) for given in arguments.pattern]
    return questions(base, asked, arguments.density, arguments.seeds, arguments.block_size)


def _pattern(named: str | dict[str, Any], arguments: argparse.Namespace) -> PatternSpec:
    """A family's name or a PatternSpec's dict; "adaptive" gets its warm-up and annealing from the options."""
    given = PatternSpec(named) if isinstance(named, str) else PatternSpec.from_dict(named)
    if given.name != ADAPTIVE:
        return patterns.build(given).spec
    shares = {"warmup": arguments.warmup, "anneal": arguments.anneal}
    steps = {name: round(part * arguments.steps) for name, part in shares.items()}
    if sum(steps.values()) > arguments.steps:
        raise ValueError(f"--warmup and --anneal are shares of the same {arguments.steps} steps, got {steps}")
    return PatternSpec(ADAPTIVE, {**steps, **given.params})


def _device(text: str) -> torch.device:
    """A device that this machine has."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"a device of this machine was wanted, got {text!r}: {first}") from error
    return device


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", required=True, help="results folder or pyarrow.fs URI; absolute in a submitted job")
    add_adopt(parser)
    parser.add_argument("--task", default="byte_lm", help="byte_lm, recall or your own module:function")
    parser.add_argument(
        "--task-params", type=json_object, default='{"train_batch": 1, "eval_windows": 32}', help="JSON; text, batches"
    )
    parser.add_argument(
        "--pattern",
        type=name_or_json,
        nargs="+",
        default=[ADAPTIVE, "sliding_window", "sink_window", "bigbird", "random", DENSE],
        help="names or JSON specs",
    )
    parser.add_argument("--density", nargs="+", type=float, default=[0.05, 0.1])
    parser.add_argument("--seeds", nargs="+", type=seed, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--warmup", type=share, default=0.0, help="share of the steps that adaptive trains densely")
    parser.add_argument("--anneal", type=share, default=0.0, help="share of the steps in which it becomes sparse")
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=at_least(1), help="CPU threads (torch's choice)")
    parser.add_argument("--git-commit", default=git_commit(Path(__file__).parent), help="recorded with each row")
    return parser.parse_args()


if __name__ == "__main__":
    with interruptible(AGAIN), ending(FAILED, ValueError, TypeError, OSError):
        sys.exit(main())
