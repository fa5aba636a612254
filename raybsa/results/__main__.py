"""A finished results folder made into few files:

python -m raybsa.results compact results/search
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from raybsa.results.store import Store


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m raybsa.results", description="Look after a results folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    compact = commands.add_parser("compact", help="join one file a trial into one file, once no job writes there")
    compact.add_argument("results", metavar="RESULTS", help="folder or pyarrow.fs URI that a job wrote")
    options = parser.parse_args(arguments)
    try:
        records = Store(options.results).compact()
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not records:
        print(f"error: results were wanted, found none under {options.results!r}", file=sys.stderr)
        return 1
    print(f"{records} records in one file under {options.results}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
