"""Attention mass on captured q, k, v as a quality that searches take: against plain softmax, and through the job."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raybsa import patterns
from raybsa.cluster.worker import Worker
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.capture import Captured, save_calls
from raybsa.tasks.captured import prepare_judgement, question_of
from raybsa.timing import DeviceLock

SIZES = (3, 2, 64, 8)  # samples, heads, tokens, head_dim
WINDOW = AttentionSpec("base", PatternSpec("sliding_window"), density=0.4, block_size=8)
BASE = TrialSpec("byte_lm", (WINDOW,), train_steps=4)


@pytest.fixture
def calls():
    generator = torch.Generator().manual_seed(0)
    return [Captured(*(torch.randn(SIZES, generator=generator) for _ in range(3)), causal=True) for _ in range(2)]


@pytest.fixture
def asked(calls, tmp_path):
    save_calls(calls, tmp_path / "qkv.pt")
    return question_of(str(tmp_path / "qkv.pt"), BASE)


def quality(spec):
    return prepare_judgement(spec, torch.device("cpu"), DeviceLock(torch.device("cpu"))).advance().value


def test_the_quality_is_the_share_of_softmax_weights_in_kept_blocks(asked, calls):
    rule = patterns.build("sliding_window")
    kept = rule.layout(64, num_heads=2, q_block_size=8, causal=True, density=0.4).to_dense()
    tokens = kept.repeat_interleave(8, 1).repeat_interleave(8, 2)
    shares = []
    for call in calls:
        scores = call.q[-1] @ call.k[-1].transpose(-1, -2) / 8**0.5
        weights = scores.masked_fill(torch.ones(64, 64).triu(1).bool(), -torch.inf).softmax(-1)
        shares.append(float((weights * tokens).sum() / weights.sum()))
    assert quality(asked) == pytest.approx(sum(shares) / 2, abs=1e-5)
    assert quality(replace(asked, attention=(AttentionSpec("dense"),))) == 1.0
    assert quality(asked) < quality(replace(asked, attention=(replace(WINDOW, density=0.8),))) < 1


def test_another_seed_judges_by_other_samples(asked):
    seeds = [replace(asked, task_params={**asked.task_params, "eval_seed": seed}) for seed in range(1000, 1006)]
    assert len({round(quality(spec), 9) for spec in seeds}) == 3, "one value a sample"


def test_a_learned_pattern_is_distilled_on_the_samples_that_are_not_judged(asked):
    learned = replace(asked, attention=(replace(WINDOW, variant="adaptive", pattern=PatternSpec("adaptive")),))
    assert 0.2 < quality(learned) < 1
    alone = replace(learned, task_params={**learned.task_params, "held_out": 3})
    with pytest.raises(ValueError, match="at least one sample are needed"):
        quality(alone)


def test_a_trial_of_it_is_timed_and_judged_whatever_rung_it_is_asked_for(asked):
    worker = Worker("cpu", num_threads=1, repeats=5, budget_s=0.01)
    found = worker.run(asked, 1)
    assert (found.quality_name, found.quality_goal) == ("attention_mass_recall", "max")
    assert found.trained_steps == 4
    assert found.forward_ms_p50 > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 4}, r"\(heads, KV heads, head_dim, tokens\) \(4, 4, 8, 64\) were wanted, call 0 has \(2, 2"),
        ({"causal": False}, r"causal=False, were wanted; got calls of 3 sample\(s\), causal=True"),
        ({"task_params": {}}, "needs the parameter 'file'"),
    ],
)
def test_a_question_that_does_not_fit_the_file_is_refused(asked, changes, message):
    with pytest.raises(ValueError, match=message):
        quality(replace(asked, **changes))


def test_the_search_takes_its_sizes_from_the_file(asked, tmp_path, monkeypatch, capsys):
    arguments = ["--captured", tmp_path / "qkv.pt", "--preset", "quick", "--trials", 3, "--dry-run", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["search.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "search.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "trials would run after 0 that are done" in capsys.readouterr().out
