"""``python -m dashboards.app RESULTS``: the report's figures in a browser, alive while jobs write."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Sequence

from dashboards.app.folder import Folder
from dashboards.app.prefix import prefix_of
from raybsa.printable import printable
from raybsa.results.store import StoreError


def main(arguments: Sequence[str] | None = None) -> int:
    printable(sys.stdout)
    parser = argparse.ArgumentParser(
        prog="python -m dashboards.app", description="Show measured results in a browser while they are written."
    )
    parser.add_argument("results", metavar="RESULTS", help="folder or pyarrow.fs URI that jobs write; may be empty yet")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)"
    )
    parser.add_argument("--port", type=int, default=8050, help="0: any free one (default: %(default)s)")
    parser.add_argument(
        "--prefix", metavar="PATH", help="behind a proxy: what its paths begin with, as /user/ann/proxy/8050/"
    )
    parser.add_argument("--own-patterns", action="store_true", help="import and draw patterns named as module:Class")
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        wanted = "--port must be in 1..65535, or 0 for any free one"
        print(f"error: {wanted}, got {options.port}", file=sys.stderr)
        return 2
    try:
        prefix = prefix_of(options.prefix)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        port = free_port(options.host, options.port)
    except OSError as error:
        print(f"error: cannot listen at {options.host}, port {options.port}: {error.strerror}", file=sys.stderr)
        return 1
    try:
        from dashboards.app.frame import make_app
    except ModuleNotFoundError as error:
        print(f"error: the app needs Dash: pip install 'raybsa[dashboard]' ({error})", file=sys.stderr)
        return 1
    try:
        app = make_app(Folder(options.results), own_patterns=options.own_patterns, warm=True, prefix=prefix)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        print(f"{address_of(options.host, port, prefix)} shows {options.results}; Ctrl-C ends it", flush=True)
        app.run(host=options.host, port=port)
    except (StoreError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def address_of(host: str, port: int, prefix: str) -> str:
    """What a browser on this machine opens."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{'' if prefix == '/' else prefix}"


def free_port(host: str, port: int) -> int:
    """The port, proven free before anything is read or told; any free one for 0. Raises OSError where it is taken."""
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        return found.getsockname()[1]


if __name__ == "__main__":
    raise SystemExit(main())
