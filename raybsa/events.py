"""Events: what happened, one line of ``key=value`` pairs each, through the standard ``logging`` module.

    events = Events(__name__, run="train-20261123-214729-9c1e", trial="train-20261123-214729-9c1e-000")
    events.bind(generation=2, rank=0).tell("step", step=7, seconds=0.031)

    time=2026-11-23T21:47:29.123Z level=INFO event=step run=train-... trial=... generation=2 rank=0 step=7 seconds=0.031

Nothing is printed until somebody asks: ``show``, which is the jobs' ``--verbose``, or a handler of one's own on the
logger ``raybsa``, whose records hold the pairs as the dict ``record.args["fields"]``.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping

_PLAIN = re.compile(r'[^\s="]+')


class Events:
    """Tells events of one source.

    Args:
        source: a module's name, under ``raybsa``.
        known: what every event of this source says, ``run`` and ``trial`` for instance.
    """

    def __init__(self, source: str, **known: object) -> None:
        self._logger, self._known = logging.getLogger(source), known

    def bind(self, **known: object) -> Events:
        """The same source, knowing more."""
        return Events(self._logger.name, **self._known | known)

    def tell(self, event: str, **fields: object) -> None:
        """Logs that ``event`` happened, at level INFO; a field that is None is left out."""
        pairs = {"event": event} | self._known | fields
        told = {key: value for key, value in pairs.items() if value is not None}
        self._logger.info("%(fields)s", {"fields": _Pairs(told)})


class _Pairs(dict[str, object]):
    """A line is made only where one is printed."""

    def __str__(self) -> str:
        return " ".join(f"{key}={_shown(value)}" for key, value in self.items())


def show() -> None:
    """Events of this process go to its standard error from now on; safe to call twice."""
    logger = logging.getLogger("raybsa")
    if not any(handler.name == __name__ for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.name = __name__
        handler.setFormatter(_formatter())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def read(line: str) -> Mapping[str, str]:
    """The pairs of a line, as text, whatever stands before them."""
    pairs = re.findall(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|[^\s="]+)', line)
    return {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def _formatter() -> logging.Formatter:
    formatter = logging.Formatter("time=%(asctime)s.%(msecs)03dZ level=%(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    return formatter


def _shown(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
