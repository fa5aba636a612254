"""Who was not asked is not silent: a driver that was held up does not lose its workers."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from raybsa.cluster.crew import Crew, _Worker
from raybsa.cluster.member import MemberSettings
from raybsa.cluster.resources import Share
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec


def test_a_worker_is_lost_by_what_it_did_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TrialSpec("byte_lm", (AttentionSpec("distributed", PatternSpec("bigbird")),))
    crew = Crew(spec, MemberSettings(), Share(1), 2.0, print, lambda actor, fault: None)
    status = SimpleNamespace(remote=lambda: "a reference")
    crew._workers[0] = _Worker(SimpleNamespace(status=status), None, heard_at=time.monotonic() - 100.0)
    monkeypatch.setattr("ray.wait", lambda references, timeout: ([], references))
    assert crew.silent([0]) == {}, "it was not asked for 100 s"
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 2.0)
    assert crew.silent([0]) == {0: "no sign of life for 2 s"}
