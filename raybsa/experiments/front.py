"""The front as files: one ``best.json`` a point, ready to load into a model and to be asked again."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from raybsa.results.pareto import Objective, pareto_front
from raybsa.results.record import Measured, Record, finite, not_finite, spec_of
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from raybsa.tasks.attention import layer_size

FOLDER = "front"
_BEST = re.compile(rf"{FOLDER}(-\d+)?/\d+/best\.json")


def write_front(store: Store, records: Sequence[Record], objectives: Sequence[Objective]) -> list[str]:
    """Writes ``front/<rank>/best.json`` for every point of the front (the best by the first objective is 01), in place
    of those of an earlier front, and returns their paths. Where somebody else's files, or one that was changed, lie in
    the way, the front goes to ``front-2``, and so on."""
    front = pareto_front(records, objectives)
    for earlier in _best_files(store):
        store.delete_made(earlier.rpartition("/")[0])
    names = _names(store, len(front))
    paths = []
    for name, record in zip(names, front, strict=True):
        content = best(record, objectives, f"{store.root.rstrip('/')}/{name}")
        paths.append(store.write_file(name, json.dumps(content, indent=2, allow_nan=False).encode()))
    return paths


def left_out(records: Sequence[Record], objectives: Sequence[Objective]) -> list[str]:
    """A line for each finished trial that is on no front because an objective of it is infinite or not a number."""
    columns = {objective.column for objective in objectives}
    found = ((record, not_finite(record)) for record in records if record.status == "ok")
    odd = ((record, {name: value for name, value in values.items() if name in columns}) for record, values in found)
    return [
        f"on no front: {record.trial_id} ({record.pattern}), {', '.join(f'{n} is {v}' for n, v in values.items())}"
        for record, values in odd
        if values
    ]


def _names(store: Store, count: int) -> list[str]:
    """Where so many points may be written."""
    folders = itertools.chain([FOLDER], (f"{FOLDER}-{number}" for number in itertools.count(2)))
    choices = ([f"{folder}/{rank:02d}/best.json" for rank in range(1, count + 1)] for folder in folders)
    return next(names for names in choices if all(map(store.is_free, names)))


def _best_files(store: Store) -> list[str]:
    """What was written of the present front, in order."""
    return [name for name in store.made("") if _BEST.fullmatch(name)]


def best(record: Record, objectives: Sequence[Objective], path: str) -> dict[str, Any]:
    """The content of a point's file, which lies at ``path``.

    ``attention`` holds the arguments of ``create_block_sparse_attention``, where layers differ a list of them, one a
    layer; ``layers`` is always such a list; ``sizes`` says what their densities came to at the timed length.
    """
    spec, measured = spec_of(record), asdict(finite(record))
    layers = [spec.factory_arguments(index) for index in range(spec.num_layers)]
    command = ["python", "jobs/search.py", "--again", path, "--out", "results/again"]
    return {
        "attention": layers[0] if len(spec.attention) == 1 else layers,
        "layers": layers,
        "spec": spec.to_dict(),
        "spec_hash": record.spec_hash,
        "sizes": [layer_size(spec, index) for index in range(spec.num_layers)],
        "objectives": {str(objective): objective.value(record) for objective in objectives},
        "metrics": {name: measured[name] for name in asdict(Measured()) if measured[name] is not None},
        "trial_id": record.trial_id,
        "git_commit": record.git_commit,
        "command": shlex.join(command),
    }


class Best(NamedTuple):
    """What a ``best.json`` asks, and what its search measured (objective, as text -> value)."""

    spec: TrialSpec
    objectives: dict[str, float]


def read_best(path: str) -> Best:
    """A ``best.json`` again. Raises ValueError where the file is none, OSError where it cannot be read."""
    with open(path, "rb") as file:
        return _parsed(file.read(), path)


def front_objectives(store: Store) -> list[str]:
    """What the search of a results folder was after, as texts.

    Raises:
        ValueError: there is no front in it.
    """
    name = next(iter(_best_files(store)), f"{FOLDER}/01/best.json")
    try:
        return list(_parsed(store.read_file(name), name).objectives)
    except FileNotFoundError as error:
        raise ValueError(
            f"a search with a Pareto front was wanted, found none under {store.root!r}: one that was killed writes it "
            "when it goes on (--resume); --objectives quality,latency takes its trials as they are"
        ) from error


def _parsed(text: bytes, path: str) -> Best:
    try:
        data = json.loads(text)
        return Best(TrialSpec.from_dict(data["spec"]), dict(data["objectives"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a best.json with the 'spec' of a trial was wanted, got {path!r}: {error!r}") from error
