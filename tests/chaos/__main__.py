"""``python -m tests.chaos --seed 7``: one scenario; ``--seeds 20``: those of seeds 0 to 19, one after another."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos.cluster import Playground, playground
from tests.chaos.scenarios import SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--seed", type=int, nargs="+", help="these scenarios alone")
    which.add_argument("--seeds", type=int, help="so many, from 0")
    options = parser.parse_args()
    seeds = options.seed or range(options.seeds)
    with tempfile.TemporaryDirectory(prefix="raybsa-chaos-") as folder, playground(Path(folder)) as place:
        failed = [seed for seed in seeds if not _holds(seed, place, Path(folder))]
    print(f"{len(seeds) - len(failed)} of {len(seeds)} scenarios hold" + (f", not {failed}" if failed else ""))
    return 1 if failed else 0


def _holds(seed: int, place: Playground, folder: Path) -> bool:
    scenario, begin = SCENARIOS[seed % len(SCENARIOS)], time.monotonic()
    own = folder / f"seed-{seed}"
    own.mkdir()
    try:
        scenario(random.Random(seed), place, own)
        verdict = "holds"
    except PermissionError as error:
        verdict = f"left out: {error}"
    except AssertionError:
        traceback.print_exc(file=sys.stdout)
        verdict = "DOES NOT HOLD"
    print(
        f"seed {seed}: {scenario.__name__.replace('_', ' ')}: {verdict}, {time.monotonic() - begin:.0f} s", flush=True
    )
    return verdict != "DOES NOT HOLD"


if __name__ == "__main__":
    sys.exit(main())
