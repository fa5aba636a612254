"""Recorder: writes each answer of a search as it comes, on the driver's side, and ends a search that has become
pointless: one whose answers cannot be written, or in which trial after trial fails for a reason outside of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ray import tune

from raybsa import signals
from raybsa.experiments.keeping import keep
from raybsa.experiments.questions import LATE
from raybsa.experiments.recording import Run, record_of, write
from raybsa.experiments.space import SearchSpace
from raybsa.results.record import MACHINE, Outcome, Record
from raybsa.results.store import Store, StoreError
from raybsa.spec import TrialSpec

IN_VAIN = 5  # so many trials in a row that failed for the machine's reasons: the next ones would too


class OutsideTrouble(RuntimeError):
    """A search cannot go on for a reason outside of its questions; the message says which."""


class Recorder(tune.Callback):
    """Its ``records`` are those of this run in the order in which they ended.

    Args:
        tell: hear each record once it is stored.
    """

    def __init__(self, space: SearchSpace, store: Store, run: Run, tell: Sequence[Callable[[Record], None]]) -> None:
        self._space, self._store, self._run, self._tell = space, store, run, tell
        self._numbers: dict[str, int] = {}
        self._lost: Counter[str] = Counter()
        self._trouble: Exception | None = None
        self._in_vain = 0
        self.records: list[Record] = []
        self._unwritten: dict[str, Outcome] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes its callbacks down, and no one reads them again."""
        return {}

    def on_step_end(self, iteration: int, trials: list, **info: Any) -> None:
        """New trials are the last of the list, in the order in which they were asked. The one moment at which nothing
        is half-written: here the search ends where it has to.

        Raises:
            KeyboardInterrupt: a signal was heard.
            StoreError: an answer could not be written.
            OutsideTrouble: too many trials in a row failed for reasons outside of them.
        """
        for trial in trials:
            self._number(trial)
        signals.raise_if_heard()
        if self._trouble is not None:
            raise self._trouble

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """It begins again."""
        self._lost[trial.trial_id] += 1

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """``done`` is set by the trial itself where it came to its end, and by Tune where a scheduler stops it."""
        if not result["done"] or result.get(LATE):
            return
        outcome = result["outcome"]
        measured = outcome.measurement
        steps = self._space.base.train_steps
        if not outcome.error and not outcome.pruned and measured.quality is not None and measured.trained_steps < steps:
            outcome = replace(outcome, pruned=f"stopped after {measured.trained_steps} of {steps} training steps")
        self._keep(trial, outcome)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The trial's own actor was lost, again and again, not only its worker; or it found no room for its ring."""
        reason = str(trial.get_error()).strip().splitlines()[-1]
        error = f"its trial actor failed {self._lost[trial.trial_id] + 1} times: {reason}"
        self._keep(trial, Outcome(self._question(trial), None, error, 1, cause=MACHINE))

    def _question(self, trial: Any) -> TrialSpec:
        return self._space.spec(trial.config)

    def _keep(self, trial: Any, outcome: Outcome) -> None:
        outcome = replace(outcome, failures=outcome.failures + self._lost[trial.trial_id])
        record = self._write(outcome, self._run.trial_id(self._number(trial)))
        if outcome.spec.weights is not None:
            return
        self.records.append(record)
        self._in_vain = self._in_vain + 1 if outcome.cause == MACHINE else 0
        if self._in_vain == IN_VAIN:
            self._trouble = OutsideTrouble(f"{IN_VAIN} trials in a row failed for reasons outside: {outcome.error}")
        for listener in self._tell:
            listener(record)

    def _write(self, outcome: Outcome, trial_id: str) -> Record:
        try:
            return keep(self._store, outcome, self._run, trial_id)
        except StoreError as error:
            self._trouble = error
            self._unwritten[trial_id] = outcome
            return record_of(outcome, self._run, trial_id)

    def write_again(self) -> list[Record]:
        """Tries once more to write what could not be written, for the disk may have room by now, and with it what went
        with a folder that somebody deleted (but for its curves). Returns what still cannot be written."""
        try:
            held = {record.trial_id for record in Store.create(self._store.root).read_records()}
            for record in self.records:
                if record.trial_id in self._unwritten:
                    write(self._store, record, self._unwritten[record.trial_id])
                elif record.trial_id not in held:
                    self._store.write_record(record)
        except StoreError:
            return [record for record in self.records if record.trial_id in self._unwritten]
        return []

    def _number(self, trial: Any) -> int:
        """Its own: Tune moves a trial that begins again to the end of its list."""
        return self._numbers.setdefault(trial.trial_id, len(self._numbers))
