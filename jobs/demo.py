"""From nothing to a report on this machine: start a Ray head, submit the search to it, show where the report is.

    python jobs/demo.py --out /tmp/demo

It runs what anyone would run on a cluster, ``ray job submit --working-dir . -- python jobs/search.py ...``, against a
head of its own that ends with it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from raybsa.cluster.head import local_head, require_room_for_a_head
from raybsa.experiments.options import add_adopt, at_least
from raybsa.experiments.place import FAILED, ending, git_commit, interruptible, refusing
from raybsa.results.roots import is_uri, local_path
from raybsa.results.store import Store

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    arguments = _arguments()
    with refusing():
        if is_uri(arguments.out):
            raise ValueError(f"the demo writes to a folder of this machine, got {arguments.out!r}")
        out = Path(local_path(arguments.out))
        require_room_for_a_head()
        Store.create(out, adopt=arguments.adopt)
    started = time.monotonic()
    print(f"Starting a Ray head with {arguments.num_cpus} CPUs ...", flush=True)
    with local_head(arguments.num_cpus) as head:
        search = ["python", "jobs/search.py", "--preset", "demo", "--out", str(out), *arguments.search_arguments]
        if commit := git_commit(ROOT):
            search += ["--git-commit", commit]  # the uploaded copy has no .git
        submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.address]
        submit += ["--working-dir", str(ROOT), "--", *search]
        print("$ ray job submit --working-dir . -- " + shlex.join(search), flush=True)
        code = subprocess.run(submit, env=head.environment, cwd=ROOT, check=False).returncode
    if code:
        print(f"The search failed (exit code {code}); what it had measured is in {out}", file=sys.stderr)
        return code
    print(f"Done in {time.monotonic() - started:.0f} s. Open the report in a browser: {out / 'report.html'}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for records and the report")
    add_adopt(parser)
    parser.add_argument(
        "--num-cpus", type=at_least(1), default=os.cpu_count(), help="CPU shares of the head (default: all)"
    )
    parser.add_argument("search_arguments", nargs="*", help="after `--`: more arguments for jobs/search.py")
    return parser.parse_args()


if __name__ == "__main__":
    with interruptible("add -- --resume to go on from what was measured"), ending(FAILED, RuntimeError, OSError):
        sys.exit(main())
