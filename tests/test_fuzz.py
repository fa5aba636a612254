"""The fuzzer of tests/fuzz.py: a slice of its cases is right, and it finds, shrinks and repeats what is planted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import torch

from tests import fuzz
from tests.fuzzing.case import Case
from tests.fuzzing.check import run
from tests.fuzzing.draw import draw

SLOW = ("compile", "export", "jit_trace", "make_fx_grad")
LASTING = ("dtensor",)  # leaves a process group behind


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")  # of torch's tracers and compilers
def test_a_slice_of_the_cases_is_right():
    cases = [case for case in (draw(1, index) for index in range(30)) if case.transform not in SLOW + LASTING]
    found = [(case, run(case)) for case in cases if case.backend != "flex"]
    assert [(str(case), outcome) for case, outcome in found if outcome.kind == "wrong"] == []
    assert sum(outcome.kind == "right" for _, outcome in found) > 15


def test_a_case_is_the_same_wherever_it_is_drawn_and_survives_json():
    for index in range(200):
        case = draw(3, index)
        assert draw(3, index) == case == Case.of(json.loads(json.dumps(case.to_dict())))


def test_a_planted_fault_is_found_shrunk_and_repeated(capsys):
    plant = ["--here", "--backend", "tests.fuzzing.planted:Ragged"]
    assert fuzz.main([*plant, "--seed", "28", "--cases", "5", "--faults", "1"]) == 1
    told = capsys.readouterr().out
    assert "out is off by" in told
    small = json.loads(re.search("--exactly '(.*)'", told)[1])
    assert set(small) <= {"backend", "q_len", "kv_len", "q_block", "kv_block", "head_dim", "v_dim", "grad_of"}
    assert "print(*run(Case(" in told
    number = re.search(r"--case (\d+:\d+)", told)[1]
    for again in (  # the plain case, and the one that was drawn
        ["--exactly", json.dumps(small)],
        [*plant, "--case", number],
    ):
        assert fuzz.main(again) == 1
        assert "wrong: out is off by" in capsys.readouterr().out


def test_a_crash_is_a_fault_of_the_case_that_crashed(capsys):
    fields = {"backend": "tests.fuzzing.planted:Crashes", "mask": "bool", "q_len": 8, "kv_len": 8}
    assert fuzz.main(["--exactly", json.dumps(fields)]) == 1
    assert "wrong: the process died: SIGSEGV" in capsys.readouterr().out
