"""PatternChoices: the part of a search space that says which rule a layer follows: a family with its parameters, or two
families that share the heads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from raybsa.experiments.rank_choices import Config
from raybsa.spec import PatternSpec, canonical_json

MIXTURE = "per_head"


@dataclass(frozen=True)
class PatternChoices:
    """Args:
    families, mixtures, shares: as in ``SearchSpace``.
    num_heads: of the questions.

    Raises:
        ValueError: a mixture that is no pair of different families, a parameter without a list of choices, or a share
            of the heads that is none.
    """

    families: Mapping[str, Mapping[str, Sequence[Any]]]
    mixtures: tuple[tuple[str, str], ...]
    shares: tuple[float, ...]
    num_heads: int

    def __post_init__(self) -> None:
        for pair in self.mixtures:
            if not is_pair_of(pair, str) or len(set(pair)) != 2 or set(pair) - set(self.families):
                got = list(pair) if isinstance(pair, tuple) else pair
                raise ValueError(f"a mixture is a pair of {sorted(self.families)}, got {got!r}")
        for family, parameters in self.families.items():
            for name, choices in parameters.items():
                if not isinstance(choices, (list, tuple)) or not choices:
                    raise ValueError(f"{name} of {family} has a list of choices, got {choices!r}")
        if not all(isinstance(share, (int, float)) and 0 < share < 1 for share in self.shares):
            raise ValueError(f"a share of the heads lies between 0 and 1, got {list(self.shares)}")

    def names(self, followed: Iterable[str], config: Config) -> list[str]:
        """The parameters of these in a configuration whose layers follow ``followed``, as far as it tells yet."""
        rules = dict.fromkeys(followed)
        if MIXTURE not in rules:
            return self._parameters(rules)
        return ["mixture", "share", *self._parameters(config.get("mixture", "").split("+"))]

    def choices(self, name: str) -> list[Any]:
        """What one of them can be; parameters of a family are JSON texts."""
        if name == "mixture":
            return ["+".join(pair) for pair in self.mixtures]
        if name == "share":
            return list(self.shares)
        family, _, parameter = name.partition(".")
        return [canonical_json(choice) for choice in self.families[family][parameter]]

    def pattern(self, family: str, config: Config) -> PatternSpec:
        """The rule of a family, or of the mixture, with its parameters.

        Raises:
            ValueError: a mixture that leaves a rule without heads.
        """
        if family == MIXTURE:
            return self._mixture(config)
        return PatternSpec(family, {name: json.loads(config[f"{family}.{name}"]) for name in self.families[family]})

    def named(self, pattern: PatternSpec) -> Config:
        """The part of a configuration that names the pattern of all layers. Undoes ``pattern``."""
        if pattern.name != MIXTURE:
            return {"family": pattern.name, **parameters_of(pattern)}
        parts = [PatternSpec.from_dict(part) for part in pattern.params["parts"]]
        first, second = parts[0], parts[-1]
        count = self.num_heads * parts.count(first) // len(parts)
        share = next((share for share in self.shares if round(share * self.num_heads) == count), None)
        named = {"family": MIXTURE, "mixture": f"{first.name}+{second.name}", "share": share}
        return named | parameters_of(first) | parameters_of(second)

    # ---- for ourselves -----------------------------------------------------------------------------------------

    def _parameters(self, rules: Iterable[str]) -> list[str]:
        return [f"{rule}.{name}" for rule in rules if rule in self.families for name in self.families[rule]]

    def _mixture(self, config: Config) -> PatternSpec:
        """The first rule on a share of the heads, the second on the others: as short a cycle as says so."""
        first, second = (self.pattern(rule, config).to_dict() for rule in config["mixture"].split("+"))
        count = round(config["share"] * self.num_heads)
        if not 0 < count < self.num_heads:
            raise ValueError(f"a share of {config['share']:g} of {self.num_heads} heads leaves a rule without heads")
        turns = gcd(count, self.num_heads)
        parts = [first] * (count // turns) + [second] * ((self.num_heads - count) // turns)
        return PatternSpec(MIXTURE, {"parts": parts})


def is_pair_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether it is a list or tuple of two of that kind."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(one, kind) for one in value)


def parameters_of(pattern: PatternSpec) -> Config:
    """A family's parameters as a configuration has them."""
    return {f"{pattern.name}.{name}": canonical_json(value) for name, value in pattern.params.items()}
