"""A search over a user's own torch module: docs/search.md runs as written, and the contract of its function holds."""

from __future__ import annotations

import os
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raybsa import patterns
from raybsa.cluster.worker import Worker
from raybsa.experiments.front import write_front
from raybsa.experiments.recording import Run, record_of
from raybsa.own import own_of_file
from raybsa.results.pareto import named_objectives
from raybsa.results.record import Outcome
from raybsa.results.store import Store
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.module import prepare_training, question_of
from raybsa.timing import DeviceLock
from raybsa.variants.swap_watch import service_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
EXAMPLE, LOADING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
RINGS = str(ROOT / "docs" / "search" / "ring.yaml")
CPU = torch.device("cpu")
WINDOW = AttentionSpec("base", PatternSpec("sliding_window"), density=0.4, block_size=16)
ALL = AttentionSpec("base", PatternSpec("dense"), block_size=16)
BASE = TrialSpec("byte_lm", (AttentionSpec("dense"),), train_steps=4, task_params={"train_batch": 2})

# Small, and all that the contract has: mappings, a held-out list, batches that end after two and are begun again.
SMALL = """
import torch
from torch import nn
from beside import STEPS

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.inner(x).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, 1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

def batch(seed):
    x = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "of": [x.roll(1, 1)]}

def loss(model, batch):
    STEPS.append((model.training, float(batch["x"].sum())))
    return (model(batch["x"]) - batch["of"][0]).square().mean()

def question(seed):
    return nn.Sequential(Block(), Block()), [batch(seed + 1), batch(seed + 2)], loss, [batch(seed + 3)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's, and a path on which nothing of it stays."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("STEPS = []\n")
    yield tmp_path
    for name in ("mine", "beside", "raybsa_own_mine"):
        sys.modules.pop(name, None)


@pytest.fixture
def own(folder):
    """``own(text)`` is the question about ``question`` of a file with that text."""

    def ask(text=SMALL, **changes):
        (folder / "mine.py").write_text(text)
        return question_of(f"{folder / 'mine.py'}:question", replace(BASE, **changes))

    return ask


def training(spec):
    return prepare_training(spec, CPU, DeviceLock(CPU))


# ---- the page ------------------------------------------------------------------------------------------------------


def test_the_example_is_short_and_its_point_loads_into_its_module(own, folder, monkeypatch):
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 15
    spec = replace(own(EXAMPLE), attention=(WINDOW,), train_steps=2)
    found = Worker("cpu", num_threads=1, repeats=5, budget_s=0.01).run(spec)
    assert (found.quality_name, found.quality_goal, found.trained_steps) == ("held_out_loss", "min", 2)
    assert 3 < found.quality < 6, "about log(64): it has learned nothing yet"
    record = record_of(Outcome(spec, found, None, 0), Run("run", "test"), "run-0")
    write_front(Store.create(folder / "results" / "mine"), [record], named_objectives(["quality", "latency"], "min"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    scope = {}
    exec(compile(LOADING, "search.md", "exec"), scope)
    assert all(parameter.grad is not None for parameter in scope["model"].parameters())
    assert "sliding_window" in repr(scope["best"]["layers"])
    assert "SlidingWindow" in repr(scope["model"][1].layers[1].self_attn)


# ---- what is asked, and what comes ---------------------------------------------------------------------------------


def test_the_question_has_the_sizes_of_the_module_and_the_names_of_what_attends(own, folder):
    spec = own(seed=3)
    assert spec.task_params == {"function": f"{folder / 'mine.py'}:question", "modules": ["0", "1"]}
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.batch) == (2, 2, None, 4, 2)
    assert (spec.seq_len, spec.train_len, spec.causal, spec.dtype, spec.seed) == (64, 64, True, "float32", 3)


def test_the_baseline_is_the_module_untouched_and_all_blocks_train_as_it_does(own):
    asked, results = own(), {}
    for name, layers in {
        "dense": BASE.attention,
        "all": (ALL,),
        "mixed": (ALL, BASE.attention[0]),
        "window": (WINDOW,),
    }.items():
        made = training(replace(asked, attention=layers))
        swapped = [module for module in made._model.modules() if service_of(module) is not None]
        assert bool(swapped) == (name != "dense")
        results[name] = made.advance().value
    assert results["all"] == pytest.approx(results["dense"], rel=1e-4)
    assert results["mixed"] == pytest.approx(results["dense"], rel=1e-4)
    assert abs(results["window"] - results["dense"]) > 1e-3


def test_what_is_held_out_is_judged_by_in_eval_and_never_trained_on_and_batches_begin_again(own):
    spec = own()
    made, steps = training(spec), sys.modules["beside"].STEPS
    model = made._model
    batch = sys.modules["raybsa_own_mine"].batch
    steps.clear()
    with torch.no_grad():
        wanted = float((model(batch(3)["x"]) - batch(3)["of"][0]).square().mean())
    assert made.advance(0).value == pytest.approx(wanted)
    made.advance()
    sums = {number: float(batch(number)["x"].sum()) for number in (1, 2, 3)}
    assert steps == [(False, sums[3]), *((True, sums[number]) for number in (1, 2, 1, 2)), (False, sums[3])]


def test_without_held_out_the_first_eight_batches_are_set_aside(own):
    text = SMALL.replace("[batch(seed + 1), batch(seed + 2)], loss, [batch(seed + 3)]", "map(batch, range(12)), loss")
    made, steps = training(own(text)), sys.modules["beside"].STEPS
    batch = sys.modules["raybsa_own_mine"].batch
    steps.clear()
    made.advance()
    number = {float(batch(n)["x"].sum()): n for n in range(12)}
    assert [(trains, number[x]) for trains, x in steps] == [(True, n) for n in range(8, 12)] + [
        (False, n) for n in range(8)
    ]


def test_its_own_calls_are_timed_and_the_density_is_their_mean(own, monkeypatch):
    spec, seen = own(), []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *a, **k: (seen.append(a[0].shape), attend(*a, **k))[1],
    )
    worker = Worker("cpu", num_threads=1, repeats=5, budget_s=0.01)
    found = worker.run(replace(spec, attention=(WINDOW, AttentionSpec("dense"))), 0)
    window = worker.run(replace(spec, attention=(WINDOW,)), 0)
    assert set(seen) == {(2, 2, 64, 4)}
    assert found.density == pytest.approx((1 + window.density) / 2)
    layout = patterns.build("sliding_window").layout(64, num_heads=2, q_block_size=16, causal=True, density=0.4)
    assert window.density == layout.density
    assert 0 < found.forward_ms_p50 < found.forward_backward_ms_p50
    assert min(found.dense_forward_ms_p50, found.peak_bytes, found.dense_peak_bytes) > 0


def test_a_learned_pattern_learns_in_it_and_a_preview_judges_it_untrained(own, tmp_path):
    spec = own()
    weights = str(tmp_path / "weights.pt")
    worker = Worker("cpu", num_threads=1, repeats=5, budget_s=0.01, keep={spec.digest: weights})
    dense = worker.run(spec)
    looked = worker.run(replace(spec, attention=(ALL,), task_params={**spec.task_params, "weights": weights}))
    assert (looked.quality, looked.trained_steps) == (pytest.approx(dense.quality, rel=1e-5), 0)
    assert looked.density == 1.0
    learned = AttentionSpec("adaptive", PatternSpec("adaptive"), density=0.5, block_size=16)
    made = training(replace(spec, attention=(learned,)))
    gates = {name: p.clone() for name, p in made._model.named_parameters() if "gate" in name}
    made.advance()
    assert len(gates) >= 2
    assert any(not torch.equal(p, gates[name]) for name, p in made._model.named_parameters() if name in gates)


def test_a_file_is_run_once_and_again_where_it_changed(folder):
    (folder / "mine.py").write_text("from beside import STEPS\nSTEPS.append(1)\ndef one(): return 1\n")
    name = f"{folder / 'mine.py'}:one"
    assert own_of_file(name, "a function") is own_of_file(name, "a function")
    (folder / "mine.py").write_text("from beside import STEPS\nSTEPS.append(2)\ndef one(): return 2\n")
    os.utime(folder / "mine.py", ns=(0, 0))
    assert own_of_file(name, "a function")() == 2
    assert sys.modules["beside"].STEPS == [1, 2]


# ---- what is refused -----------------------------------------------------------------------------------------------

RETURN = "nn.Sequential(Block(), Block()), [batch(seed + 1), batch(seed + 2)], loss, [batch(seed + 3)]"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("nn.Linear(2, 2)", r"must return \(model, batches, loss\) or these and held_out, got Linear"),
        ("1, 2", "must return .*, got a tuple of 2"),
        ("[], [batch(1)], loss", r"with an nn.Module and a loss\(model, batch\), got \(list, list, function\)"),
        ("Block(), [batch(1)], loss, []", "at least one batch to be judged by"),
        ("Block(), [], loss, [batch(1)]", "they ended after 0"),
        ("Block(), [batch(1)] * 3, loss", "batches for all steps, .* were wanted of .*: they ended after 3"),
        ("Block(), [batch(1)], lambda model, batch: 1.0, [batch(1)]", "a tensor of no dimension, got float"),
        ("Block(), [batch(1)], lambda m, b: m(b['x']), [batch(1)]", r"of no dimension, got a tensor \(2, 64, 8\)"),
        ("nn.Linear(8, 8), [batch(1)], loss, [batch(1)]", "a model that calls F.scaled_dot_product_attention or has"),
    ],
)  # fmt: skip
def test_a_function_that_breaks_its_contract_is_told_what_was_wanted(own, returned, message):
    with pytest.raises(ValueError, match=message):
        own(SMALL.replace(RETURN, returned))


def test_a_generator_that_ends_too_soon_is_an_error_of_the_trial(own):
    spec = own(SMALL.replace("[batch(seed + 1), batch(seed + 2)]", "(batch(n) for n in range(2))"))
    with pytest.raises(ValueError, match="they ended after 2"):
        training(spec).advance()


def test_another_module_than_when_the_search_began_is_refused(own):
    spec = own()
    with pytest.raises(ValueError, match=r"as it did when the search began, 3 modules .* got 2 modules \('0', '1'\)"):
        training(replace(spec, num_layers=3))
    with pytest.raises(ValueError, match="needs the parameter 'function'"):
        training(replace(spec, task_params={}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--module", "FILE"], "as FILE:FUNCTION, got"),
        (["--module", "FILE:nothing"], "there is no 'nothing' in"),
        (["--module", "/no/such.py:question"], "a file that is there, got '/no/such.py:question'"),
        (["--module", "FILE:question", "--seq-len", "64"], "--module brings its own sizes, got seq_len beside it"),
        (["--module", "BROKEN:f"], "cannot be imported: invalid syntax (broken.py, line 1)"),
        (["--module", "LOST:f"], "cannot be imported: No module named 'no_such_module'"),
        (["--module", "FILE:folded"], "jobs/search.py: module '0': q must be a tensor (batch, heads, tokens, "),
        (["--module", "FILE:question", "--text", "x"], "not allowed with argument"),
        (["--module", "FILE:question", "--space", RINGS], "only the tasks byte_lm, speed can be split over ranks, got"),
    ],
)  # fmt: skip
def test_the_job_says_in_one_line_what_it_cannot_use(own, folder, monkeypatch, capsys, arguments, message):
    own(
        SMALL
        + "\ndef folded(seed):\n    model, *others = question(seed)\n    return (nn.Sequential(Folded()), *others)\n"
        + FOLDED
    )
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "lost.py").write_text("import no_such_module\n")
    files = {"FILE": "mine.py", "BROKEN": "broken.py", "LOST": "lost.py"}
    for word, file in files.items():
        arguments = [argument.replace(word, str(folder / file)) for argument in arguments]
    code, told = job(monkeypatch, capsys, *arguments, "--out", folder / "out")
    assert code == 2
    assert message in told
    assert "Traceback" not in told


FOLDED = """
class Folded(Block):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)
"""


def test_the_job_asks_about_the_module_and_its_layers_may_differ(own, folder, monkeypatch, capsys):
    own()
    options = ["--preset", "quick", "--per-layer", "--trials", 6, "--learning-rate", 0.1, "--dry-run"]
    code, told = job(monkeypatch, capsys, "--module", f"{folder / 'mine.py'}:question", *options, "--out", folder)
    assert code == 0
    assert "6 trials would run after 0 that are done" in told
    assert "sliding_window / bigbird" in told


def job(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["search.py", *map(str, arguments)])
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("nothing should have started"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / "search.py"), run_name="__main__")
    shown = capsys.readouterr()
    return ended.value.code, shown.out + shown.err
