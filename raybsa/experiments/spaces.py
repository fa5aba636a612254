"""Named search spaces, and spaces from YAML files: both are the arguments of a SearchSpace as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from raybsa.experiments.space import DEFAULT_FAMILIES, SearchSpace
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec

_WINDOWS: dict[str, dict[str, list[Any]]] = {
    "sliding_window": {},
    "sink_window": {"sink": [16, 64, 128]},
    "bigbird": {"num_globals": [1, 2]},
    "chunked": {"shift": [0, 64]},
    "dilated": {"dilation_rates": [[1, 2, 4], [1, 4, 16]]},
}

# What one would take without a search, from the papers: BigBird's base model (blocks of 64, 3 of them a window, 2
# global, 3 random), Longformer's window of 512, StreamingLLM's 4 sinks and 1,020 newest tokens.
PAPERS = (
    AttentionSpec("base", PatternSpec("bigbird", {"window": 128, "num_globals": 2, "num_random": 3}), None, 64),
    AttentionSpec("base", PatternSpec("sliding_window", {"window": 512}), None, 64),
    AttentionSpec("base", PatternSpec("sink_window", {"sink": 4, "window": 1020}), None, 64),
)

SPACES: dict[str, dict[str, Any]] = {
    # Seconds: three families, so that every path runs.
    "quick": {
        "families": {"sliding_window": {}, "bigbird": {"num_globals": [1, 2]}, "strided": {}},
        "densities": (0.1, 0.5),
        "block_sizes": (16, 32),
    },
    # The demo's: eight rules that look different, so that some of its few trials are left for what they teach.
    "demo": {
        "families": {
            "sliding_window": {},
            "sink_window": {"sink": [64]},
            "bigbird": {},
            "dilated": {"dilation_rates": [[1, 4, 16]]},
            "power_of_two": {},
            "strided": {},
            "vertical_slash": {"columns": [[0, 256]], "offsets": [[0, 128, 256]]},
            "random": {},
        },
        "densities": (0.03, 0.4),
        "block_sizes": (32, 16, 64),
    },
    # Every family, with the parameters that matter most.
    "families": {"families": DEFAULT_FAMILIES, "densities": (0.03, 0.4), "block_sizes": (16, 32, 64)},
    # What sees near tokens and a little more, and heads that differ.
    "window-family": {
        "families": _WINDOWS,
        "densities": (0.03, 0.4),
        "block_sizes": (16, 32, 64),
        "mixtures": (("sink_window", "dilated"), ("sliding_window", "bigbird")),
    },
    # 16K tokens and more: coarse blocks, low densities, reach.
    "long-context": {
        "families": {
            "sink_window": {"sink": [64, 128, 256]},
            "bigbird": {"num_globals": [1, 2]},
            "dilated": {"dilation_rates": [[1, 2, 4], [1, 4, 16], [1, 8, 64]]},
            "vertical_slash": {"columns": [[0, 1024], [0, 4096]], "offsets": [[0, 1024, 4096], [0, 512, 2048]]},
            "power_of_two": {},
            "strided": {"stride": [8, 32]},
            "butterfly": {},
            "random": {},
        },
        "densities": (0.005, 0.1),
        "block_sizes": (64, 128),
        "mixtures": (("sink_window", "strided"), ("sink_window", "random"), ("sink_window", "power_of_two")),
        "shares": (0.5, 0.75, 0.875),
    },
    "everything": {
        "families": {
            **DEFAULT_FAMILIES,
            "sink_window": {"sink": [16, 64, 128, 256]},
            "bigbird": {"num_globals": [1, 2, 4]},
            "dilated": {"dilation_rates": [[1, 2, 4], [1, 4, 16], [1, 8, 64]]},
            "vertical_slash": {"columns": [[0], [0, 256], [0, 1024]], "offsets": [[0, 128, 256], [0, 512, 2048]]},
            "strided": {"stride": [4, 8, 16]},
            "fixed": {"span": [4, 8, 16], "summary": [1, 2, 4, 8]},
            "chunked": {"shift": [0, 64, 256]},
        },
        "densities": (0.005, 0.5),
        "block_sizes": (16, 32, 64, 128),
        "mixtures": (
            ("sink_window", "strided"),
            ("sink_window", "random"),
            ("sliding_window", "power_of_two"),
            ("sliding_window", "vertical_slash"),
            ("sliding_window", "global_blocks"),
        ),
    },
}


def make_space(name: str, base: TrialSpec) -> SearchSpace:
    """The space of a name of ``SPACES`` or of a YAML file, around ``base``.

    A file holds a mapping of SearchSpace's arguments but ``base``.

    Raises:
        ValueError: neither a name nor a file, or a file that does not describe a space.
    """
    if name in SPACES:
        return space_of(SPACES[name], base)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"a space is one of {', '.join(SPACES)} or a YAML file, got {name!r}")
    try:
        with path.open(encoding="utf-8") as file:
            return space_of(yaml.safe_load(file), base)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the space file {name} cannot be used: {error}") from error


def space_of(data: Mapping[str, Any], base: TrialSpec) -> SearchSpace:
    """A space from plain data. Raises ValueError for keys that a space does not have, and values of another form."""
    known = {field.name for field in fields(SearchSpace)} - {"base"}
    if not isinstance(data, Mapping) or set(data) - known:
        got = [*map(str, data)] if isinstance(data, Mapping) else data
        raise ValueError(f"a space has the keys {sorted(known)}, got {got!r}")
    values: dict[str, Any] = {
        name: tuple(tuple(v) if isinstance(v, list) else v for v in _listed(name, value))
        for name, value in data.items()
        if name not in ("densities", "families", "references", "per_layer")
    }
    if "densities" in data:
        given = data["densities"]
        values["densities"] = tuple(given) if isinstance(given, list) else given
    if "families" in data:
        values["families"] = _families(data["families"])
    values["references"] = tuple(map(AttentionSpec.from_dict, _listed("references", data.get("references", ()))))
    values["per_layer"] = data.get("per_layer", False)
    if not isinstance(values["per_layer"], bool):
        raise ValueError(f"per_layer is true or false, got {values['per_layer']!r}")
    return SearchSpace(base, **values)


def _listed(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is a list, got {value!r}")
    return value


def _families(given: Any) -> dict[str, dict[str, Any]]:
    """Family -> parameter -> choices; a family without any parameters may be empty."""
    if not isinstance(given, Mapping) or not all(isinstance(params or {}, Mapping) for params in given.values()):
        raise ValueError(f"families map a name to its parameters and their lists of choices, got {given!r}")
    return {family: dict(params or {}) for family, params in given.items()}
