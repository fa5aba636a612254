"""The free rung: a question is not trained where what is known already beats it by a wide margin.

Its costs are predicted by the CostModel. Its quality is bounded by relatives: the same rule at a higher density, and
the dense baseline, are taken to be at least as good, but for a slack. Where some finished trial beats that hopeful
quality and the hopeful costs at once, or a bound cannot be met, the training would only confirm it.
"""

from __future__ import annotations

from collections.abc import Sequence

from raybsa.experiments.costs import CostModel
from raybsa.results.pareto import Objective
from raybsa.results.record import Record, finite, spec_of
from raybsa.spec import AttentionSpec, TrialSpec

DOMINATED = "predicted to be beaten by a wide margin"
OUT_OF_BOUNDS = "predicted to break a bound by a wide margin"
MARGIN = 1.5  # predicted costs may be wrong by this factor
SLACK = 0.02  # of a quality's value: trainings differ by chance, and a sparser pattern may be a little better


class Screen:
    """Why a question is not worth its training, by all records so far; None where it may be.

    Args:
        objectives: of the search.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self._objectives = objectives
        self._records: list[Record] = []
        self._model: CostModel | None = None
        self._stale = True

    def learn(self, record: Record) -> None:
        """Takes a finished trial into account."""
        if record.status in ("ok", "pruned"):
            self._records.append(finite(record))
            self._stale = True

    @property
    def model(self) -> CostModel | None:
        """Fitted to all records so far; None while they are too few."""
        if self._stale:
            self._model, self._stale = CostModel.learned(self._records), False
        return self._model

    def __call__(self, spec: TrialSpec) -> str | None:
        asked_anyway = all(layer.density is None for layer in spec.attention)  # the baseline and references
        if self.model is None or asked_anyway:
            return None
        hopeful = self._hopeful(spec, self.model)
        if hopeful is None:
            return None
        pairs = zip(self._objectives, hopeful, strict=True)
        if any(o.goal == "min" and o.most is not None and hope > o.most for o, hope in pairs):
            return OUT_OF_BOUNDS
        whole = [record for record in self._records if record.status == "ok"]
        return DOMINATED if any(self._beats(record, hopeful) for record in whole) else None

    def _hopeful(self, spec: TrialSpec, model: CostModel) -> list[float] | None:
        """The best that each objective may come to; None where one cannot be said."""
        predicted, best = model.predict(spec), []
        for objective in self._objectives:
            if objective.column == "quality":
                value = self._best_quality(spec, objective)
            elif objective.column == "density":
                value = predicted.density
            else:
                value = objective.value(predicted)
                value = None if value is None else value / (MARGIN if objective.goal == "min" else 1 / MARGIN)
            if value is None:
                return None
            best.append(value)
        return best

    def _best_quality(self, spec: TrialSpec, objective: Objective) -> float | None:
        """The worst of its better relatives' qualities, with the slack; None without any."""
        whole = [record for record in self._records if record.status == "ok" and _is_denser(record, spec)]
        relatives = [record.quality for record in whole if record.quality is not None]
        if not relatives:
            return None
        return max(relatives) * (1 - SLACK) if objective.goal == "min" else min(relatives) * (1 + SLACK)

    def _beats(self, record: Record, hopeful: Sequence[float]) -> bool:
        """Better in all objectives, bounds kept."""
        for objective, hope in zip(self._objectives, hopeful, strict=True):
            value = objective.value(record)
            if value is None or objective.excess(value) > 0:
                return False
            if not (value < hope if objective.goal == "min" else value > hope):
                return False
        return True


def _is_denser(record: Record, spec: TrialSpec) -> bool:
    """Whether a record is of the dense baseline, or of the same rules with at least as many blocks kept, whose
    gradients lost nothing on their way that those of ``spec`` would not."""
    if record.pattern == "dense":
        return True
    answered = spec_of(record)
    if answered.density_meaning != spec.density_meaning:
        return False
    if answered.ranks.codec["name"] != "none" and answered.ranks.codec != spec.ranks.codec:
        return False
    same = len(answered.attention) == len(spec.attention)
    return same and all(map(_keeps_at_least, answered.attention, spec.attention))


def _keeps_at_least(one: AttentionSpec, other: AttentionSpec) -> bool:
    """Whether one layer follows the same rule as another and keeps no less."""
    if (one.rule, one.block_size) != (other.rule, other.block_size):
        return False
    if one.density is None or other.density is None:
        return one.density == other.density
    return one.density >= other.density
