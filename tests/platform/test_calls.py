"""A program that is wrong ends a training, however many steps lie between its failures; what may pass does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayTaskError

from raybsa.cluster.calls import Calls, Wreck
from raybsa.cluster.journal import Journal, TrainingFailed
from raybsa.cluster.membership import Membership


@pytest.fixture
def hear(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What becomes of a call in which worker 0 of one raised an error."""

    def call(error: Exception) -> None:
        def get(reference: object) -> None:
            raise RayTaskError("train", "", error).as_instanceof_cause()

        monkeypatch.setattr("ray.wait", lambda references, **_: (references, []))
        monkeypatch.setattr("ray.get", get)
        crew = SimpleNamespace(silent=lambda workers: {}, cancel=lambda *_: {})
        roster = SimpleNamespace(members=Membership(1, (0,)))
        Calls(cast(Any, crew), cast(Any, roster), Journal(), 1.0).gather({0: "a reference"})

    return call


@pytest.mark.parametrize(
    "error", [ValueError("no"), ZeroDivisionError("modulo by zero"), KeyError("lr"), AttributeError("no such")]
)
def test_a_program_that_is_wrong_ends_the_training(hear: Any, error: Exception) -> None:
    with pytest.raises(
        TrainingFailed, match=f"refused what it was asked for, as any other would: {type(error).__name__}"
    ):
        hear(error)


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("CUDA error"), OSError("no space left")])
def test_what_may_pass_costs_a_worker(hear: Any, error: Exception) -> None:
    with pytest.raises(Wreck) as wreck:
        hear(error)
    assert wreck.value.lost == {0: f"{type(error).__name__}: {error}"}
