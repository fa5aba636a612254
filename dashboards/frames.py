"""The results folder as small typed tables: trials with their parsed specs, grouped into fair comparisons."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from operator import attrgetter
from typing import Any

from dashboards.wording import pattern_label, trial_label, whole_label
from raybsa.results.record import Record, SeriesPoint, finite, not_finite, spec_of
from raybsa.results.store import Store
from raybsa.spec import TrialSpec, canonical_json
from raybsa.tasks.attention import layer_size

COMPRESSION = "compression"


_asked = attrgetter(*(f.name for f in fields(TrialSpec) if f.name not in ("attention", "seed", "density_meaning")))


@dataclass(frozen=True)
class Trial:
    """A record and the question it answers; what it measured as ``not_finite`` is not in the record."""

    record: Record
    spec: TrialSpec
    not_finite: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def id(self) -> str:
        return self.record.trial_id

    @property
    def failed(self) -> bool:
        return self.record.status not in ("ok", "pruned")

    @property
    def pruned(self) -> bool:
        """Whether a search stopped it early: its quality is that of fewer steps, and it is on no front."""
        return self.record.status == "pruned"

    @property
    def is_of_kernels(self) -> bool:
        """Whether it is a row of the gpu suite: one library's kernels on one layout."""
        return self.spec.task == "peers"

    @property
    def is_dense(self) -> bool:
        """Whether every layer is the dense baseline."""
        return all(layer.pattern is None for layer in self.spec.attention)

    @cached_property
    def label(self) -> str:
        """Its name for a line, cut where it is long."""
        return trial_label(self.spec)

    @property
    def whole_label(self) -> str | None:
        """The name where ``label`` is cut, to be shown on demand; None where that is all of it."""
        whole = whole_label(self.spec)
        return None if whole == self.label else whole

    @property
    def asked_density(self) -> float | None:
        """The density that all layers were asked for; None where they differ or the pattern's own was taken."""
        asked = {layer.density for layer in self.spec.attention}
        return asked.pop() if len(asked) == 1 else None

    @property
    def density(self) -> float | None:
        """The density asked for; where there was none, the one that was measured."""
        return self.record.density if self.asked_density is None else self.asked_density

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """What the densities of the layers came to, in words; nothing of patterns that are not raybsa's own, which only
        code from elsewhere could tell."""
        own = ":" not in canonical_json([layer.rule.to_dict() for layer in self.spec.attention])
        layers = range(len(self.spec.attention))
        return tuple(dict.fromkeys(size for i in layers if own and (size := layer_size(self.spec, i))))

    @property
    def has_density(self) -> bool:
        """Whether a layer was asked for a density, so that what this means counts."""
        return any(layer.density is not None for layer in self.spec.attention)

    @cached_property
    def question(self) -> str:
        """Equal for trials whose numbers may be compared: all but attention, ranks and seed agree, device and the
        meaning of densities included."""
        return canonical_json([self.asked, self.spec.density_meaning])

    @property
    def asked(self) -> list[Any]:
        """``question`` as JSON values, less the meaning of densities."""
        asked = [dict(value) if isinstance(value, Mapping) else value for value in _asked(self.spec.alone)]
        record = self.record
        place = [record.device, record.device_name, record.num_threads, record.quality_name, record.quality_goal]
        return [asked, place]

    def but(self, *names: str) -> list[Any]:
        """All of the question but attention, seed and what is named, and the device, as JSON values."""
        left_out = {"attention", "seed", "density_meaning", *names}
        asked = {name: value for name, value in self.spec.to_dict().items() if name not in left_out}
        return [asked, self.record.device_name]


@dataclass(frozen=True)
class Results:
    """Everything a report shows: trials, and the curves of each that has any, by its id; ``problems``: what could not
    be read, and why."""

    trials: tuple[Trial, ...]
    series: Mapping[str, Sequence[SeriesPoint]]
    problems: Sequence[str] = ()

    def points(self, trials: Iterable[Trial]) -> list[SeriesPoint]:
        """The curves of some trials, one after the other."""
        return [point for trial in trials for point in self.series.get(trial.id, ())]

    @property
    def failures(self) -> list[Trial]:
        """What did not finish; a library that refused a question is no failure."""
        return [trial for trial in self.trials if trial.failed and trial.record.status != "refused"]

    @property
    def quality_groups(self) -> list[list[Trial]]:
        """Trials with a finite quality, one list a question, largest first."""
        found = (
            trial
            for trial in self.trials
            if not trial.failed and trial.spec.task != COMPRESSION and trial.record.quality is not None
        )
        return _groups(found, lambda trial: trial.asked)

    @property
    def compressed(self) -> list[Trial]:
        """Trainings whose gradients travelled by a codec."""
        return [trial for trial in self.trials if trial.spec.task == COMPRESSION and not trial.failed]

    @property
    def recovered(self) -> list[Trial]:
        """Trainings over ranks that survived a failure."""
        return [t for t in self.trials if t.spec.task == "byte_lm" and t.record.failures_survived and not t.failed]

    @property
    def speed_groups(self) -> list[list[Trial]]:
        """Benchmark trials, one list for all that share everything but attention and length."""
        found = (trial for trial in self.trials if trial.spec.task == "speed" and not trial.failed)
        return _groups(found, lambda trial: [*trial.but("seq_len", "batch"), trial.record.num_threads])

    @property
    def ring_groups(self) -> list[list[Trial]]:
        """Trials of rings, one list for all that share heads, dtype and device."""
        found = (trial for trial in self.trials if trial.spec.task == "ring" and not trial.failed)
        return _groups(found, lambda trial: [*trial.but("seq_len", "task_params"), trial.record.devices])

    @property
    def only_kernels(self) -> bool:
        """Whether the gpu suite is all that ran here."""
        return all(trial.is_of_kernels for trial in self.trials)

    @property
    def peer_groups(self) -> dict[str, list[Trial]]:
        """Rows of the gpu suite by the GPU's name, refusals and failures included."""
        groups: dict[str, list[Trial]] = defaultdict(list)
        for trial in self.trials:
            if trial.is_of_kernels:
                groups[trial.record.device_name].append(trial)
        return dict(groups)


def load(results: str) -> Results:
    """Reads a results folder (a path or a ``pyarrow.fs`` URI).

    Raises:
        ValueError: nothing that can be read was measured there.
        OSError: the folder cannot be read.
    """
    store = Store(results)
    trials = list(_trials(store))
    if not trials:
        search, benchmark = search_command(results), benchmark_command(results)
        raise ValueError(
            f"a report needs measured trials, found none under {results!r}: run `{search}` or `{benchmark}`"
        )
    series: dict[str, list[SeriesPoint]] = defaultdict(list)
    for point in store.read_series():
        if math.isfinite(point.value):
            series[point.trial_id].append(point)
    return Results(tuple(trials), dict(series), tuple(store.problems))


def trial_of(record: Record) -> Trial:
    """A record with its spec parsed; raises ValueError naming the trial where that fails."""
    odd = not_finite(record)
    return Trial(finite(record) if odd else record, spec_of(record), odd)


def _trials(store: Store) -> Iterator[Trial]:
    for record in store.read_records():
        try:
            yield trial_of(record)
        except ValueError as error:
            store.pass_over(record.trial_id, str(error))


def search_command(results: str) -> str:
    return f"python jobs/search.py --out {results}"


def benchmark_command(results: str) -> str:
    return f"python jobs/benchmark.py --out {results}"


def _groups(trials: Iterable[Trial], question: Callable[[Trial], list[Any]]) -> list[list[Trial]]:
    """Trials whose question is equal and whose densities mean the same, largest group first; those without a density
    stand in the groups of either meaning."""
    groups: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[canonical_json(question(trial))].append(trial)
    return sorted((part for group in groups.values() for part in _by_meaning(group)), key=len, reverse=True)


def _by_meaning(trials: list[Trial]) -> Iterator[list[Trial]]:
    """The trials of each meaning of density; its own ones first where it is an earlier one."""
    earlier = [trial for trial in trials if not trial.spec.is_current]
    current = [trial for trial in trials if trial.spec.is_current]
    if earlier:
        yield earlier + [trial for trial in current if not trial.has_density]
    if not earlier or any(trial.has_density for trial in current):
        yield current


def line_label(trial: Trial) -> str:
    """A trial's name without its density: the trials of one name form the lines of a speed figure."""
    layers = {pattern_label(layer.pattern) for layer in trial.spec.attention}
    return " / ".join(sorted(layers))
