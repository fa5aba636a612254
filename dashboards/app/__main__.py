"""``python -m dashboards.app RESULTS``: the report's figures in a browser, alive while jobs write."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from dashboards.app.folder import Folder
from raybsa.results.store import StoreError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dashboards.app", description="Show measured results in a browser while they are written."
    )
    parser.add_argument("results", metavar="RESULTS", help="folder or pyarrow.fs URI that jobs write; may be empty yet")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8050, help="(default: %(default)s)")
    parser.add_argument("--own-patterns", action="store_true", help="import and draw patterns named as module:Class")
    options = parser.parse_args(arguments)
    try:
        from dashboards.app.frame import make_app
    except ModuleNotFoundError as error:
        print(f"error: the app needs Dash: pip install 'raybsa[dashboard]' ({error})", file=sys.stderr)
        return 1
    try:
        app = make_app(Folder(options.results), own_patterns=options.own_patterns, warm=True)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        print(f"http://{options.host}:{options.port} shows {options.results}; Ctrl-C ends it", flush=True)
        app.run(host=options.host, port=options.port)
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
