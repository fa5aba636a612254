"""What a search may ask: families, their parameters, densities and block sizes around one base question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from raybsa.spec import ADAPTIVE, DENSE, AttentionSpec, PatternSpec, TrialSpec, canonical_json
from raybsa.variants.source import layout_source

# Density sets a family's own free parameter; what else shapes it is searched.
DEFAULT_FAMILIES: dict[str, dict[str, list[Any]]] = {
    "sliding_window": {},
    "sink_window": {"sink": [16, 64]},
    "bigbird": {"num_globals": [1, 2]},
    "dilated": {"dilation_rates": [[1, 2, 4], [1, 4, 16]]},
    "power_of_two": {},
    "vertical_slash": {"columns": [[0, 256]], "offsets": [[0, 128, 256]]},
    "strided": {},
    "fixed": {"span": [4, 8]},
    "chunked": {},
    "random": {},
    "butterfly": {},
    "global_blocks": {},
}


@dataclass(frozen=True)
class SearchSpace:
    """The questions of one search: the base's, with every attention that the space allows, and the dense baseline.

    Args:
        base: everything but the attention.
        families: catalog name, or ``"adaptive"`` with the options of ``BlockSelector``, -> parameter -> choices (JSON
            values). A parameter that is not named keeps its default.
        densities: lowest and highest, drawn log-uniformly.
        block_sizes: choices, powers of two; families are first compared at the first.

    Raises:
        ValueError: an unknown family or parameter, or a range that is none.
    """

    base: TrialSpec
    families: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=lambda: DEFAULT_FAMILIES)
    densities: tuple[float, float] = (0.05, 0.5)
    block_sizes: tuple[int, ...] = (16, 32, 64)

    def __post_init__(self) -> None:
        low, high = self.densities
        if not 0 < low <= high <= 1:
            raise ValueError(f"densities must be 0 < lowest <= highest <= 1, got {self.densities}")
        if not self.families or not self.block_sizes:
            raise ValueError(f"a space needs families and block sizes, got {self.families} and {self.block_sizes}")
        for config in self.first_points()[1:]:
            attention = self.spec(config).layer(0)
            layout_source(
                attention.pattern,
                None,
                None,
                density=attention.density,
                block_size=attention.block_size,
                causal=self.base.causal,
                num_heads=self.base.num_heads,
                head_dim=self.base.head_dim,
                num_kv_heads=self.base.num_kv_heads,
            )

    def suggest(self, trial: Any) -> dict[str, Any] | None:
        """Optuna's define-by-run: the first question of a study is the dense baseline, the others are drawn."""
        if trial.number == 0:
            return {"family": DENSE}
        family = trial.suggest_categorical("family", list(self.families))
        trial.suggest_float("density", *self.densities, log=True)
        trial.suggest_categorical("block_size", list(self.block_sizes))
        for name, choices in self.families[family].items():
            trial.suggest_categorical(f"{family}.{name}", [canonical_json(choice) for choice in choices])
        return None

    def first_points(self) -> list[dict[str, Any]]:
        """The baseline, then each family once at the middle density and the first block size: all get a hearing."""
        low, high = self.densities
        middle = {"density": (low * high) ** 0.5, "block_size": self.block_sizes[0]}
        points: list[dict[str, Any]] = [{"family": DENSE}]
        for family, params in self.families.items():
            firsts = {f"{family}.{name}": canonical_json(choices[0]) for name, choices in params.items()}
            points.append({"family": family, **middle, **firsts})
        return points

    def spec(self, config: Mapping[str, Any]) -> TrialSpec:
        """The question that a drawn configuration asks."""
        if config["family"] == DENSE:
            return replace(self.base, attention=(AttentionSpec(DENSE),))
        density = float(f"{config['density']:.3g}")  # what is pasted from a report should be readable
        variant = ADAPTIVE if config["family"] == ADAPTIVE else "base"
        attention = AttentionSpec(variant, self._pattern(config), density=density, block_size=config["block_size"])
        return replace(self.base, attention=(attention,))

    def _pattern(self, config: Mapping[str, Any]) -> PatternSpec:
        family = config["family"]
        return PatternSpec(family, {name: json.loads(config[f"{family}.{name}"]) for name in self.families[family]})
