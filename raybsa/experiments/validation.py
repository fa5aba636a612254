"""Does a front hold? Its points again: other seeds, longer training, and an evaluation on data that no search saw.

A search picks the best of many noisy trials, so the front flatters itself. A point holds where it is still on the front
of all points that were measured again, and keeps its bounds by the means of its new trials. Two points are compared
seed by seed: trials of one seed share their data, their judges and much of their luck.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean, pstdev

from raybsa.experiments.history import values_of
from raybsa.results.pareto import Objective
from raybsa.results.record import Record, spec_of
from raybsa.spec import MODULE, UNTRAINED, TrialSpec, canonical_json

_FIRST_SEED = 1000  # searches count their seeds from 0


@dataclass(frozen=True)
class Verdict:
    """A point of the front and what became of it.

    ``before``, ``after`` and ``spread``: by objective, in the search, and the new trials' mean and standard deviation.
    ``by_seed``: the new trials' values. ``why_not``: why it does not hold; None where it does.
    """

    record: Record
    before: list[float]
    after: list[float]
    spread: list[float]
    why_not: str | None
    by_seed: dict[int, list[float]] = field(default_factory=dict)


def questions(points: Sequence[Record], seeds: int, longer: float) -> list[TrialSpec]:
    """Each point's question, ``seeds`` times: another seed each, ``longer`` times the steps, fresh data to judge by.

    Raises:
        ValueError: no seeds, or a training that would be shorter.
    """
    if seeds < 1 or longer < 1:
        raise ValueError(f"at least one seed and a training at least as long were wanted, got {seeds} and {longer:g}")
    return [_again(spec_of(point), _FIRST_SEED + seed, longer) for point in points for seed in range(seeds)]


def verdicts(points: Sequence[Record], found: Iterable[Record], objectives: Sequence[Objective]) -> list[Verdict]:
    """One a point, in order, from the records that answered ``questions``."""
    answers: dict[str, list[Record]] = {}
    for record in found:
        answers.setdefault(_attention(record), []).append(record)
    drafts = [_draft(point, answers.get(_attention(point), []), objectives) for point in points]
    return [draft if draft.why_not else _judged(draft, drafts, objectives) for draft in drafts]


def _again(spec: TrialSpec, seed: int, longer: float) -> TrialSpec:
    """A user's own function draws by the seed alone what it is judged by."""
    fresh = {} if spec.task in (*UNTRAINED, MODULE) else {"eval_seed": seed}
    params = {**spec.task_params, **fresh}
    return replace(spec, seed=seed, train_steps=round(longer * spec.train_steps), task_params=params)


def _draft(point: Record, answers: Sequence[Record], objectives: Sequence[Objective]) -> Verdict:
    """The means; whether the point keeps its bounds."""
    before = values_of(point, objectives)
    found = {record.seed: values_of(record, objectives) for record in answers if record.status == "ok"}
    by_seed = {seed: values for seed, values in found.items() if all(map(math.isfinite, values))}
    if not by_seed:
        return Verdict(point, before, before, [0.0] * len(before), "no new trial of it came to its end")
    columns = list(zip(*by_seed.values(), strict=True))
    after, spread = [mean(column) for column in columns], [pstdev(column) for column in columns]
    broken = (o.name for o, value in zip(objectives, after, strict=True) if o.excess(value) > 0)
    name = next(broken, None)
    why_not = f"breaks the bound of {name}" if name else None
    if odd := sorted(set(found) - set(by_seed)):
        why_not = f"its trial of seed {odd[0]} measured an objective as infinite or not at all"
    return Verdict(point, before, after, spread, why_not, by_seed)


def _judged(draft: Verdict, drafts: Sequence[Verdict], objectives: Sequence[Objective]) -> Verdict:
    """Whether another point that holds so far beats it, seed by seed."""
    for other in drafts:
        if other is not draft and other.why_not is None and _beats(other, draft, objectives):
            return replace(draft, why_not=f"beaten by {other.record.trial_id} ({other.record.pattern})")
    return draft


def _beats(one: Verdict, other: Verdict, objectives: Sequence[Objective]) -> bool:
    """At least as good everywhere on average, and somewhere better by more than that gain spreads over the seeds."""
    seeds = sorted(set(one.by_seed) & set(other.by_seed))
    if not seeds:
        return False
    gains = [
        [(other.by_seed[seed][i] - one.by_seed[seed][i]) * (1 if objective.goal == "min" else -1) for seed in seeds]
        for i, objective in enumerate(objectives)
    ]
    return all(mean(gain) >= 0 for gain in gains) and any(mean(gain) > pstdev(gain) for gain in gains)


def _attention(record: Record) -> str:
    """Equal for a point and the trials that measured it again: its attention, and how ranks share it."""
    spec = spec_of(record)
    return canonical_json([spec.to_dict()["attention"], asdict(spec.ranks)])
