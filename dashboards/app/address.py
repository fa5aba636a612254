"""The address: everything that a reader has chosen lives in the URL, so that it can be sent to somebody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qs, urlencode

FILTERS = ("run", "pattern", "device", "density")  # may hold several values
CHOICES = ("question", "trial", "a", "b", "hardware", "ranks")  # hold one
MANY = 50  # values of a name; more were not made by this app
_MOST = 1000  # parameters of a URL that are read


@dataclass(frozen=True)
class Address:
    """A page's name and what was chosen on it, by name; what was not chosen is missing."""

    page: str
    chosen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def one(self, name: str) -> str | None:
        """What was chosen where one can be."""
        values = self.chosen.get(name, ())
        return values[0] if values else None

    def with_choice(self, name: str, values: Sequence[str]) -> Address:
        """The same address with another choice; none takes it away."""
        rest = {key: value for key, value in self.chosen.items() if key != name}
        return replace(self, chosen={**rest, name: tuple(values)} if values else rest)

    def without(self, *names: str) -> Address:
        return replace(self, chosen={key: value for key, value in self.chosen.items() if key not in names})

    @property
    def filters(self) -> Address:
        """The same address with its filters alone."""
        return replace(self, chosen={name: self.chosen[name] for name in FILTERS if name in self.chosen})

    @property
    def search(self) -> str:
        """The URL's part from ``?`` on; empty where nothing was chosen."""
        pairs = [(name, value) for name in (*FILTERS, *CHOICES) for value in self.chosen.get(name, ())]
        return f"?{urlencode(pairs)}" if pairs else ""


def parse(pathname: str | None, search: str | None) -> Address:
    """The address of a URL; names that we do not know are left out, and so is all after many parameters."""
    first = (search or "").removeprefix("?").split("&", _MOST)[:_MOST]
    found = parse_qs("&".join(first))
    chosen = {name: tuple(dict.fromkeys(found[name]))[:MANY] for name in FILTERS if name in found}
    chosen |= {name: (found[name][-1],) for name in CHOICES if name in found}
    return Address((pathname or "/").strip("/"), chosen)
