"""What the options of jobs may be: argparse types whose errors say what was wanted and what came. Needs no Ray."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from typing import Any

from raybsa.kernels.api import named_backend


def at_least(least: int) -> Callable[[str], int]:
    """A whole number from ``least``."""

    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"a whole number from {least} was wanted, got {text!r}")
        return number

    return whole


def positive(text: str) -> float:
    """A number above 0, of seconds mostly."""
    return _number(text, "a positive number", lambda number: 0 < number < math.inf)


def not_negative(text: str) -> float:
    """A number from 0, of seconds mostly."""
    return _number(text, "a number from 0", lambda number: 0 <= number < math.inf)


def seed(text: str) -> int:
    """A seed that every generator takes: torch's, NumPy's and the samplers'."""
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"a seed in 0 .. {(1 << 32) - 1} was wanted, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """A part of a whole, in 0 .. 1."""
    return _number(text, "a share in 0 .. 1", lambda number: 0 <= number <= 1)


def add_adopt(parser: argparse.ArgumentParser) -> None:
    """The word that lets a job write into a folder that holds what no job wrote."""
    parser.add_argument(
        "--adopt", action="store_true", help="use --out though it holds files of yours, which stay as they are"
    )


def name_or_json(text: str) -> Any:
    """A name, or what a JSON object says: ``{"name": "powersgd", "params": {"rank": 4}}``."""
    return json_object(text) if text.lstrip().startswith("{") else text


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a JSON object was wanted, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"a JSON object was wanted, got {text!r}")
    return found


def regex(text: str) -> re.Pattern[str]:
    """A regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"a regular expression was wanted, got {text!r}: {error}") from error


def backend(text: str) -> str:
    """``auto``, or a backend's name."""
    try:
        if text != "auto":
            named_backend(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _number(text: str, wanted: str, fits: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not fits(number):
        raise argparse.ArgumentTypeError(f"{wanted} was wanted, got {text!r}")
    return number
