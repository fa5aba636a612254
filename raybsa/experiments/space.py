"""What a search may ask: families, their parameters, mixtures of heads, densities and block sizes around a base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from raybsa.experiments.layers import followed, in_turn, layer_names, named_layers
from raybsa.spec import ADAPTIVE, DENSE, AttentionSpec, PatternSpec, TrialSpec, canonical_json
from raybsa.variants.source import layout_source

MIXTURE = "per_head"
PER_LAYER = "per_layer"
REFERENCE = "reference"
Config = dict[str, Any]
_LARGEST_GRID = 4096  # ways to give each layer its family

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
        densities: lowest and highest, drawn log-uniformly; three significant digits count.
        block_sizes: choices, powers of two; families are first compared at the first.
        mixtures: pairs of different families that share the heads of a layer.
        shares: how many of a mixture's heads follow the first of its pair, in (0, 1).
        variants: which of the factory's variants compute it ("adaptive" is one of its own).
        references: attentions that are asked as they are, after the baseline: what the front has to beat.
        per_layer: also ask questions whose layers differ: each follows one of the families or stays dense. Density,
            block size and the parameters of a family are the same in all of them.

    Raises:
        ValueError: an unknown family or parameter, a range that is none, or layers that differ where there is only one.
    """

    base: TrialSpec
    families: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=lambda: DEFAULT_FAMILIES)
    densities: tuple[float, float] = (0.05, 0.5)
    block_sizes: tuple[int, ...] = (16, 32, 64)
    mixtures: tuple[tuple[str, str], ...] = ()
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    variants: tuple[str, ...] = ("base",)
    references: tuple[AttentionSpec, ...] = ()
    per_layer: bool = False

    def __post_init__(self) -> None:
        low, high = self.densities
        if not 0 < low <= high <= 1:
            raise ValueError(f"densities must be 0 < lowest <= highest <= 1, got {self.densities}")
        if not self.families or not self.block_sizes or not self.variants:
            raise ValueError(
                f"a space needs families and block sizes, and variants to compute them, got {self.families}, "
                f"{self.block_sizes} and {self.variants}"
            )
        for pair in self.mixtures:
            if len(set(pair)) != 2 or set(pair) - set(self.families):
                raise ValueError(f"a mixture is a pair of {sorted(self.families)}, got {list(pair)}")
        if not all(0 < share < 1 for share in self.shares):
            raise ValueError(f"a share of the heads lies between 0 and 1, got {list(self.shares)}")
        if self.per_layer and self.base.num_layers < 2:
            raise ValueError(f"per_layer needs at least two layers that can differ, got {self.base.num_layers}")
        object.__setattr__(self, "densities", (_three_digits(low), _three_digits(high)))
        for config in self.first_points()[1 + len(self.references) :]:
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

    def draw(self, trial: Any) -> Config:
        """An Optuna trial's suggestions; parameters are asked for where their family was drawn."""
        config: Config = {}
        while name := self._next(config):
            if name == "density":
                config[name] = trial.suggest_float(name, *self.densities, log=True)
            else:
                config[name] = trial.suggest_categorical(name, self.choices(name))
        return config

    def first_points(self) -> list[Config]:
        """The baseline, the references, then each family once at the middle density and the first block size: all get
        a hearing."""
        return self.fixed_points() + [self._middle({"family": family}) for family in self.families]

    def openings(self) -> list[Config]:
        """The first points, then these again with each other choice of a family's parameters, one at a time: what was
        never asked cannot be learned from. Where layers may differ, last a question whose layers take turns."""
        first = self.first_points()
        others = [
            point | {name: choice}
            for point in first
            for name in point
            if "." in name
            for choice in self.choices(name)[1:]
        ]
        turns = {"family": PER_LAYER} | in_turn(self.families, self.base.num_layers)
        return first + others + [self._middle(turns)] * self.per_layer

    def fixed_points(self) -> list[Config]:
        """What is asked whatever an algorithm thinks of it: the baseline and the references."""
        references = range(len(self.references))
        return [{"family": DENSE}, *({"family": REFERENCE, REFERENCE: index} for index in references)]

    def grid(self, densities: int = 4) -> Iterator[Config]:
        """The fixed points, then every combination at so many densities, evenly spaced on a logarithmic scale.

        Raises:
            ValueError: layers may differ in more ways than can be listed.
        """
        ways = (len(self.families) + 1) ** self.base.num_layers
        if self.per_layer and ways > _LARGEST_GRID:
            raise ValueError(f"a grid lists at most {_LARGEST_GRID} ways to give layers their families, got {ways}")
        steps = list(dict.fromkeys(_three_digits(float(d)) for d in np.geomspace(*self.densities, densities)))

        def complete(config: Config) -> Iterator[Config]:
            name = self._next(config)
            if name is None:
                yield config
                return
            for value in steps if name == "density" else self.choices(name):
                yield from complete(config | {name: value})

        yield from self.fixed_points()
        yield from complete({})

    def choices(self, name: str) -> list[Any]:
        """What a parameter of a configuration can be; parameters of a family are JSON texts."""
        choices: dict[str, Sequence[Any]] = {
            "family": [*self.families, *[MIXTURE] * bool(self.mixtures), *[PER_LAYER] * self.per_layer],
            "block_size": self.block_sizes,
            "variant": self.variants,
            "mixture": ["+".join(pair) for pair in self.mixtures],
            "share": self.shares,
        }
        if name in choices:
            return list(choices[name])
        if name in layer_names(self.base.num_layers):
            return list(dict.fromkeys([*self.families, DENSE]))
        family, _, parameter = name.partition(".")
        return [canonical_json(choice) for choice in self.families[family][parameter]]

    def distributions(self, config: Config) -> dict[str, BaseDistribution]:
        """Optuna's distribution of every parameter that ``config`` has."""
        density = FloatDistribution(*self.densities, log=True)
        return {n: density if n == "density" else CategoricalDistribution(self.choices(n)) for n in config}

    def spec(self, config: Config) -> TrialSpec:
        """The question that a configuration asks.

        Raises:
            ValueError: it names a combination that no rule stands for (a mixture that leaves a rule without heads).
        """
        if config["family"] == DENSE:
            return replace(self.base, attention=(AttentionSpec(DENSE),))
        if config["family"] == REFERENCE:
            return replace(self.base, attention=(self.references[config[REFERENCE]],))
        families = followed(config) if config["family"] == PER_LAYER else [config["family"]]
        layers = tuple(self._attention(family, config) for family in families)
        return replace(self.base, attention=layers if len(set(layers)) > 1 else layers[:1])

    def config(self, spec: TrialSpec) -> Config | None:
        """The configuration that asks ``spec``; None where it is no question of this space. Undoes ``spec``."""
        sparse = [layer for layer in spec.attention if layer.pattern is not None]
        patterns = [layer.pattern for layer in spec.attention if layer.pattern is not None]
        if not sparse or sparse[0] in self.references:
            return next((config for config in self.fixed_points() if self.spec(config) == spec), None)
        config: Config = {"density": sparse[0].density, "block_size": sparse[0].block_size}
        if len(spec.attention) == 1:
            config |= self._named(patterns[0])
        elif len(spec.attention) == self.base.num_layers:
            config |= {"family": PER_LAYER, **named_layers(spec.attention)}
            for pattern in patterns:
                config |= _parameters(pattern)
        if len(self.variants) > 1 and config.get("family") != ADAPTIVE:
            config["variant"] = next((layer.variant for layer in sparse if layer.variant != ADAPTIVE), self.variants[0])
        return config if self._has(config) and self.spec(config) == spec else None

    # ---- for ourselves -----------------------------------------------------------------------------------------

    def _next(self, config: Config) -> str | None:
        """The parameter to choose next; None where the configuration is complete."""
        return next((name for name in self._names(config) if name not in config), None)

    def _names(self, config: Config) -> list[str]:
        """The parameters of a configuration, as far as ``config`` tells yet, in the order in which they are drawn."""
        family = config.get("family")
        choose_variant = len(self.variants) > 1 and family != ADAPTIVE
        names = ["family", "density", "block_size", *(["variant"] if choose_variant else [])]
        rules = [str(family)]
        if family == MIXTURE:
            names += ["mixture", "share"]
            rules = config.get("mixture", "").split("+")
        elif family == PER_LAYER:
            names += layer_names(self.base.num_layers)
            rules = list(dict.fromkeys(followed(config)))
        return names + [f"{rule}.{name}" for rule in rules if rule in self.families for name in self.families[rule]]

    def _middle(self, config: Config) -> Config:
        """Completed with the middle density and each parameter's first choice."""
        low, high = self.densities
        config = config | {"density": _three_digits((low * high) ** 0.5)}
        while name := self._next(config):
            config[name] = self.choices(name)[0]
        return config

    def _attention(self, family: str, config: Config) -> AttentionSpec:
        """What one layer attends with; all of them, where they do not differ."""
        if family == DENSE:
            return AttentionSpec(DENSE, block_size=config["block_size"])
        pattern = self._mixture(config) if family == MIXTURE else self._pattern(family, config)
        variant = ADAPTIVE if family == ADAPTIVE else config.get("variant", self.variants[0])
        density = _three_digits(config["density"])  # what is pasted from a report should be readable
        return AttentionSpec(variant, pattern, density=density, block_size=config["block_size"])

    def _pattern(self, family: str, config: Config) -> PatternSpec:
        return PatternSpec(family, {name: json.loads(config[f"{family}.{name}"]) for name in self.families[family]})

    def _mixture(self, config: Config) -> PatternSpec:
        """The first rule on a share of the heads, the second on the others: as short a cycle as says so."""
        heads = self.base.num_heads
        first, second = (self._pattern(rule, config).to_dict() for rule in config["mixture"].split("+"))
        count = round(config["share"] * heads)
        if not 0 < count < heads:
            raise ValueError(f"a share of {config['share']:g} of {heads} heads leaves a rule without heads")
        turns = gcd(count, heads)
        return PatternSpec(MIXTURE, {"parts": [first] * (count // turns) + [second] * ((heads - count) // turns)})

    def _named(self, pattern: PatternSpec) -> Config:
        """The part of a configuration that names the pattern of all layers."""
        if pattern.name != MIXTURE:
            return {"family": pattern.name, **_parameters(pattern)}
        parts = [PatternSpec.from_dict(part) for part in pattern.params["parts"]]
        first, second, heads = parts[0], parts[-1], self.base.num_heads
        count = heads * parts.count(first) // len(parts)
        share = next((share for share in self.shares if round(share * heads) == count), None)
        named = {"family": MIXTURE, "mixture": f"{first.name}+{second.name}", "share": share}
        return named | _parameters(first) | _parameters(second)

    def _has(self, config: Config) -> bool:
        """Whether exactly the parameters of a question are there, each one of its choices."""
        if config.get("family") not in self.choices("family") or set(self._names(config)) != set(config):
            return False
        density = config["density"]
        fits = density is not None and self.densities[0] <= density <= self.densities[1]
        return fits and all(value in self.choices(name) for name, value in config.items() if name != "density")


def _parameters(pattern: PatternSpec) -> Config:
    return {f"{pattern.name}.{name}": canonical_json(value) for name, value in pattern.params.items()}


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
