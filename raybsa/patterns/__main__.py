"""Prints the picture of a pattern: ``python -m raybsa.patterns bigbird --seq-len 4096 --density 0.1 --causal``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from raybsa.patterns.catalog import CATALOG, build
from raybsa.patterns.pattern import Pattern
from raybsa.printable import printable


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and prints the layout."""
    printable(sys.stdout)
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        rule = build({"name": args.name, "params": dict(args.param)})
        layout = rule.layout(
            args.seq_len,
            args.kv_len,
            num_heads=args.heads,
            q_block_size=args.block_size,
            causal=args.causal,
            density=args.density,
        )
        print(rule.spec.to_dict())
        if args.density is not None and (size := _member(rule, args).size):
            print(f"density {args.density:g}: {size}")
        print(layout.describe(group=args.head if layout.num_groups > 1 else 0))
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def _member(rule: Pattern, args: argparse.Namespace) -> Pattern:
    return rule.member(
        args.seq_len, args.kv_len, density=args.density, q_block_size=args.block_size, causal=args.causal
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m raybsa.patterns", description="Print the picture of a pattern.")
    parser.add_argument("name", help=f"{', '.join(CATALOG)}, or module:Class")
    parser.add_argument("--seq-len", type=int, default=4096, help="query tokens (default: %(default)s)")
    parser.add_argument("--kv-len", type=int, help="key tokens (default: as many as queries)")
    parser.add_argument("--block-size", type=int, default=64, help="tokens of a block (default: %(default)s)")
    parser.add_argument("--density", type=float, help="share of the allowed blocks to keep (default: the rule's own)")
    parser.add_argument("--causal", action="store_true", help="keep no block above the diagonal")
    parser.add_argument("--heads", type=int, default=1, help="heads of the layout (default: %(default)s)")
    parser.add_argument(
        "--head", type=int, default=0, help="the head to show where heads differ (default: %(default)s)"
    )
    parser.add_argument(
        "--param",
        type=_param,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the rule; the value is JSON or else text",
    )
    return parser


def _param(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"want KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


if __name__ == "__main__":
    main()
