"""How long do reading and resuming a search with many finished trials take?

python -m tests.platform.many_trials FOLDER --trials 1000

The trials are made up (``answer`` of test_questions.py) and written into FOLDER, as a search would, with their curves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from raybsa.experiments.algorithms import ALGORITHMS
from raybsa.experiments.front import write_front
from raybsa.experiments.history import history
from raybsa.experiments.presets import PRESETS
from raybsa.experiments.questions import Questions
from raybsa.experiments.screen import Screen
from raybsa.experiments.search import Plan, _halving, make_questions
from raybsa.experiments.spaces import make_space
from raybsa.experiments.validity import fingerprint
from raybsa.results.pareto import named_objectives
from raybsa.results.record import SeriesPoint
from raybsa.results.store import Store
from tests.platform.test_questions import answer

SPACE = make_space("everything", PRESETS["demo"].space.base)
GOALS = named_objectives(["quality", "latency", "memory"], "min")
Found = TypeVar("Found")


def fill(store: Store, trials: int) -> None:
    """Writes what a random search of the space everything might have found."""
    questions = Questions(SPACE, ALGORITHMS["random"](SPACE, GOALS, 0), GOALS, trials=trials)
    for number in range(trials):
        spec = SPACE.spec(questions.suggest(str(number)))
        quality = 3 + 1 / (1 + 10 * (spec.attention[0].density or 1)) + 0.01 * (number % 7)
        record = replace(answer(spec, number, quality), trial_id=f"run-{number:05d}")
        losses = [SeriesPoint(record.trial_id, "train_loss", step, 0, 1.0) for step in range(50)]
        store.write_series([*losses, SeriesPoint(record.trial_id, "bits_per_byte", 25, 0, quality)])
        store.write_record(record)


def timed(what: str, call: Callable[[], Found]) -> Found:
    start = time.perf_counter()
    found = call()
    print(f"{what:<40}{time.perf_counter() - start:8.2f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--trials", type=int, default=1000)
    arguments = parser.parse_args()
    store = Store.create(arguments.folder)
    if not store.read_records():
        fill(store, arguments.trials)
    fingerprint.cache_clear()  # a search that is resumed is a new process
    plan = Plan(10**6, GOALS, early_stopping=True, screening=True, resume=True)
    screen = Screen(GOALS)
    records = timed("read the records", store.read_records)
    timed("read the curves", store.read_series)
    earlier = timed(f"{len(records)} trials as a history", lambda: history(SPACE, records))
    questions = timed("tell the sampler and the screen", lambda: make_questions(SPACE, plan, earlier, screen))
    timed("tell early stopping", lambda: _halving(SPACE, plan, earlier, store))
    timed("the first question", questions.next)
    timed("the next question", questions.next)
    timed("write the front", lambda: write_front(store, records, GOALS))
    timed("compact the folder", store.compact)
    timed("read the records of the compacted folder", store.read_records)


if __name__ == "__main__":
    main()
