"""What does a compressed gradient cost? Trains a byte model with each codec and with PyTorch's PowerSGD hook.

    python jobs/compression.py --out results/compression                     # 7 codecs x 3 seeds x 1,000 steps
    python jobs/compression.py --out results/compression --only powersgd --seeds 1

Ranks are processes of this host with one thread each; needs no Ray. Every training is a row as soon as it ends, and a
second run goes on where the first ended. The gap is that of bits per held-out byte to the uncompressed training of the
same seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raybsa.experiments.compared import HEAD, compare, line_of
from raybsa.experiments.options import add_adopt, at_least, regex
from raybsa.experiments.place import FAILED, absolute, ending, git_commit, interruptible, refusing
from raybsa.experiments.recording import Run, record_of, write
from raybsa.experiments.suites import COMPRESSION, compression
from raybsa.results.record import Measurement, Outcome
from raybsa.results.store import Store
from raybsa.spec import TrialSpec, canonical_json
from raybsa.tasks.compression import compression_params
from raybsa.tasks.compression_ranks import measure_compression
from raybsa.tasks.text import load_corpus


def main() -> int:
    arguments = _arguments()
    with refusing():
        specs = _specs(arguments)
        out = absolute("--out", arguments.out)
        store = Store.create(out, adopt=arguments.adopt)
    run = Run.start("compression", git_commit(Path(__file__).parent))
    done = {record.spec_hash for record in store.read_records() if record.status == "ok"}
    asked = [spec for spec in specs if spec.digest not in done]
    print(f"{len(asked)} trainings, results in {out}", flush=True)
    failed = sum(not _train(spec, store, run) for spec in asked)
    print(HEAD)
    for row in compare(store.read_records()):
        print(line_of(row))
    return 1 if failed else 0


def _train(spec: TrialSpec, store: Store, run: Run) -> bool:
    """One training becomes a row; False where it failed."""
    measured, error = _measured(spec)
    outcome = Outcome(spec, measured, error, 0)
    write(store, record_of(outcome, run, f"compression-{spec.digest}"), outcome)
    told = error or f"{measured and measured.quality:.4f} bits a byte, {measured and measured.train_seconds:.0f} s"
    print(f"{_codec(spec)} seed {spec.seed}: {told}", flush=True)
    return error is None


def _measured(spec: TrialSpec) -> tuple[Measurement | None, str | None]:
    try:
        return measure_compression(spec), None
    except RuntimeError as error:
        return None, str(error)


def _specs(arguments: argparse.Namespace) -> Sequence[TrialSpec]:
    content = {"text": load_corpus(COMPRESSION.task_params.get("text")).digest}
    base = replace(COMPRESSION, train_steps=arguments.steps, content=content)
    specs = compression(base, seeds=arguments.seeds, world_size=arguments.world_size)
    found = [spec for spec in specs if arguments.only.search(_codec(spec))]
    if not found:
        codecs = ", ".join(dict.fromkeys(map(_codec, specs)))
        raise ValueError(f"--only must find some of the codecs {codecs}, got {arguments.only.pattern!r}")
    for spec in found:
        compression_params(spec)
    return found


def _codec(spec: TrialSpec) -> str:
    return canonical_json(spec.task_params["codec"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/compression", help="results folder or pyarrow.fs URI")
    add_adopt(parser)
    parser.add_argument("--steps", type=int, default=COMPRESSION.train_steps)
    parser.add_argument("--seeds", type=at_least(1), default=3, help="trainings of each codec")
    parser.add_argument("--world-size", type=at_least(1), default=2, help="ranks, which share the 4 windows of a step")
    parser.add_argument("--only", type=regex, default="", metavar="REGEX", help="codecs in whose JSON it is found")
    return parser.parse_args()


if __name__ == "__main__":
    with (
        interruptible("the same command asks only for what is missing"),
        ending(FAILED, ValueError, TypeError, OSError),
    ):
        sys.exit(main())
