"""Configurations whose layers differ: ``layer0``, ``layer1``, ... say which family each follows, or "dense"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raybsa.spec import DENSE, AttentionSpec

_LAYER = "layer"


def layer_names(num_layers: int) -> list[str]:
    """The parameters that say what each layer follows."""
    return [f"{_LAYER}{number}" for number in range(num_layers)]


def followed(config: Mapping[str, Any]) -> list[str]:
    """What the layers follow, in order, as far as a configuration tells; nothing where layers do not differ."""
    numbered = {int(name.removeprefix(_LAYER)): name for name in config if name.removeprefix(_LAYER).isdigit()}
    return [config[numbered[number]] for number in sorted(numbered)]


def in_turn(families: Iterable[str], num_layers: int) -> dict[str, str]:
    """Layers take the families in turn, and after each round one is dense."""
    turns = list(dict.fromkeys([*families, DENSE]))
    return {name: turns[number % len(turns)] for number, name in enumerate(layer_names(num_layers))}


def named_layers(layers: Sequence[AttentionSpec]) -> dict[str, str]:
    """What ``layers`` follow."""
    names = (DENSE if layer.pattern is None else layer.pattern.name for layer in layers)
    return dict(zip(layer_names(len(layers)), names, strict=True))


def asked_density(config: Mapping[str, Any]) -> float | None:
    """The density that a configuration asks for, its mean where layers differ; None where it asks for none."""
    density, layers = config.get("density"), followed(config)
    if density is None or not layers:
        return density
    return sum(1.0 if layer == DENSE else density for layer in layers) / len(layers)
