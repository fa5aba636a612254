"""The families by name, and ``build``: from a spec, a dict or a name to a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from raybsa.own import own
from raybsa.patterns.bigbird import BigBird
from raybsa.patterns.blocks import Blocks
from raybsa.patterns.butterfly import Butterfly
from raybsa.patterns.chunked import Chunked
from raybsa.patterns.dense import Dense
from raybsa.patterns.dilated import Dilated
from raybsa.patterns.document import Document
from raybsa.patterns.fixed import Fixed
from raybsa.patterns.global_blocks import GlobalBlocks
from raybsa.patterns.heads import PerHead
from raybsa.patterns.pattern import Pattern, Union
from raybsa.patterns.power_of_two import PowerOfTwo
from raybsa.patterns.random import Random
from raybsa.patterns.sink_window import SinkWindow
from raybsa.patterns.sliding_window import SlidingWindow
from raybsa.patterns.strided import Strided
from raybsa.patterns.vertical_slash import VerticalSlash
from raybsa.spec import PatternSpec

CATALOG: dict[str, type[Pattern]] = {
    "sliding_window": SlidingWindow,
    "dilated": Dilated,
    "global_blocks": GlobalBlocks,
    "sink_window": SinkWindow,
    "strided": Strided,
    "fixed": Fixed,
    "random": Random,
    "bigbird": BigBird,
    "chunked": Chunked,
    "vertical_slash": VerticalSlash,
    "power_of_two": PowerOfTwo,
    "butterfly": Butterfly,
    "document": Document,
    "dense": Dense,
    "blocks": Blocks,
    "union": Union,
    "per_head": PerHead,
}


def build(pattern: Pattern | PatternSpec | Mapping[str, Any] | str) -> Pattern:
    """The rule that a spec, its dict or a family's name stands for; a rule is returned as it is.

    Raises:
        ValueError: an unknown family or parameter, a missing one, or a value out of range.
        TypeError: something else than the above.
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, str):
        pattern = PatternSpec(pattern)
    elif isinstance(pattern, Mapping):
        pattern = PatternSpec.from_dict(pattern)
    if not isinstance(pattern, PatternSpec):
        raise TypeError(f"a pattern is a rule, a PatternSpec, its dict or a name, got {pattern!r}")
    cls = _family(pattern.name)
    params = _checked(pattern.name, cls, pattern.params)
    if cls in (Union, PerHead):
        if not isinstance(params["parts"], list):
            raise ValueError(f"{pattern.name} needs a list of patterns as parts, got {params['parts']!r}")
        params["parts"] = tuple(build(part) for part in params["parts"])
    return cls(**params)


def _family(name: str) -> type[Pattern]:
    if name in CATALOG:
        return CATALOG[name]
    cls = own(name, "pattern", CATALOG)
    if not (isinstance(cls, type) and issubclass(cls, Pattern)):
        raise TypeError(f"pattern {name!r} must name a subclass of raybsa.patterns.Pattern, got {cls!r}")
    return cls


def _checked(name: str, cls: type[Pattern], params: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    unknown = set(params) - set(known)
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{name} has no parameter {', '.join(sorted(unknown))}; {has}")
    missing = [parameter for parameter, needed in known.items() if needed and parameter not in params]
    if missing:
        raise ValueError(f"{name} needs the parameter {', '.join(missing)}")
    return dict(params)
