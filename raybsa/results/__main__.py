"""A finished results folder made into few files, or written for other tools:

python -m raybsa.results compact results/search
python -m raybsa.results export results/search --csv trials.csv --tensorboard logs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from os.path import expanduser

from raybsa.printable import printable
from raybsa.results.export import write_csv, write_tensorboard
from raybsa.results.store import Store


def main(arguments: Sequence[str] | None = None) -> int:
    printable(sys.stdout)
    parser = argparse.ArgumentParser(prog="python -m raybsa.results", description="Look after a results folder.")
    commands = parser.add_subparsers(dest="command", required=True)
    compact = commands.add_parser("compact", help="join one file a trial into one file, once no job writes there")
    compact.add_argument("results", metavar="RESULTS", help="folder or pyarrow.fs URI that a job wrote")
    export = commands.add_parser("export", help="write the records as CSV, or with their curves for TensorBoard")
    export.add_argument("results", metavar="RESULTS", help="folder or pyarrow.fs URI that a job wrote")
    export.add_argument("--csv", type=expanduser, metavar="FILE", help="one row a trial")
    export.add_argument("--tensorboard", type=expanduser, metavar="FOLDER", help="one run a trial")
    options = parser.parse_args(arguments)
    try:
        told = _compact(options.results) if options.command == "compact" else _export(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(told)
    return 0


def _compact(results: str) -> str:
    records = Store(results).compact()
    if not records:
        raise ValueError(f"results were wanted, found none under {results!r}")
    return f"{records} records in one file under {results}"


def _export(options: argparse.Namespace) -> str:
    if not options.csv and not options.tensorboard:
        raise ValueError("export needs --csv or --tensorboard")
    store = Store(options.results)
    records = store.read_records()
    if not records:
        raise ValueError(f"results were wanted, found none under {options.results!r}")
    if options.csv:
        write_csv(records, options.csv)
    if options.tensorboard:
        write_tensorboard(records, store.read_series(), options.tensorboard)
    written = " and ".join(filter(None, (options.csv, options.tensorboard)))
    return f"{len(records)} records in {written}"


if __name__ == "__main__":
    raise SystemExit(main())
