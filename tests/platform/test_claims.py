"""Two searches in one folder: none asks what the other asks or has answered, and the dead hold nothing."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs

from raybsa.experiments.algorithms import ALGORITHMS
from raybsa.experiments.questions import Questions
from raybsa.holder import Holder
from raybsa.results.claims import Claims
from raybsa.results.store import Store
from raybsa.spec import TrialSpec
from tests.platform.test_questions import GOALS, SPACE, answer

SPECS = [SPACE.spec(point) for point in SPACE.first_points()]
OTHERS = replace(SPECS[0], train_steps=7)  # of another search


@pytest.fixture(params=["local", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store.create(tmp_path / "out")
    return Store.create("out", filesystem=fs.FileSystem.from_uri("mock://")[0])


def claims_of(store: Store, said: list[str] | None = None, *, yields: bool = True) -> Claims:
    told = [] if said is None else said
    return Claims(store, lambda spec: SPACE.config(spec) is not None, yields=yields, say=told.append)


def questions_of(claims: Claims, trials: int, seed: int) -> Questions:
    algorithm = ALGORITHMS["random"](SPACE, GOALS, seed)
    return Questions(SPACE, algorithm, GOALS, trials=trials, claim=claims.take, elsewhere=claims.elsewhere)


def test_a_question_is_asked_by_one_and_counts_for_the_other(store: Store) -> None:
    said: list[str] = []
    first, second = claims_of(store), claims_of(store, said)
    assert first.take(SPECS[0])
    assert first.take(OTHERS)
    assert [second.take(spec) for spec in SPECS[:2]] == [False, True]
    assert (first.elsewhere(), second.elsewhere()) == (1, 1), "the other search's own question is not counted"
    (line,) = said
    assert line.startswith(f"process {os.getpid()} of ")
    assert f"searches in {store.root} too" in line
    store.write_record(answer(SPECS[0], 0))
    first.release(SPECS[0].digest)
    assert not second.take(SPECS[0]), "it was answered meanwhile"
    assert second.elsewhere() == 1
    first.close()
    assert second.take(OTHERS), "what a search that has ended did not answer is free"
    second.close()
    assert store.shared(".raybsa/searches").names() == store.shared(".raybsa/claims").names() == []


def test_two_searches_in_one_folder_ask_together_what_one_would(store: Store) -> None:
    both = [questions_of(claims_of(store), 6, seed) for seed in (0, 1)]
    asked: list[str] = []
    for turn in range(12):
        config = both[turn % 2].next()
        if config is not None:
            asked.append(SPACE.spec(config).digest)
    assert len(set(asked)) == len(asked) == 6
    assert {questions.ended for questions in both} == {"another search in this folder asks the rest"}


def test_a_search_that_was_not_told_to_go_on_asks_all_its_questions(store: Store) -> None:
    first, second = claims_of(store), claims_of(store, yields=False)
    assert [claims.take(SPECS[0]) for claims in (first, second)] == [True, True]
    assert second.elsewhere() == 0
    assert vars(pickle.loads(pickle.dumps(second))) == {}, "Tune may write down what its callbacks hold"


@pytest.mark.parametrize("host", [socket.gethostname(), "another-host"])
def test_what_the_dead_have_claimed_is_taken_over(store: Store, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = subprocess.Popen(["true"])
    killed.wait()
    dead = replace(Holder.me(), pid=killed.pid, host=host, started="1")
    claims = claims_of(store)
    store.shared(".raybsa/searches").create("dead", json.dumps(dead.to_dict()).encode())
    store.shared(".raybsa/claims").create(SPECS[0].digest, claim_of("dead", SPECS[0]))
    if host != socket.gethostname():
        assert not claims.take(SPECS[0]), "a host that was heard of lately may be alive"
        monkeypatch.setattr("raybsa.results.claims._SILENT_S", -1e12)
    assert claims.elsewhere() == 0
    assert claims.take(SPECS[0])
    claims.close()
    store.shared(".raybsa/claims").create(SPECS[1].digest, claim_of("dead", SPECS[1]))
    claims_of(store).close()
    assert store.shared(".raybsa/claims").names() == [], "the next search tidies up"


def claim_of(search: str, spec: TrialSpec) -> bytes:
    return json.dumps({"search": search, "spec": spec.to_dict()}).encode()
