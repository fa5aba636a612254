"""Worker: one trial on one device, without Ray."""

from dataclasses import replace

import pytest
import torch

from raybsa import patterns
from raybsa.cluster.worker import Worker
from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks.attention import timed_attention
from raybsa.tasks.exactness import relative_errors
from raybsa.tasks.speed import AttentionStack, synthetic_qkv
from raybsa.tasks.training import Training

WINDOW = AttentionSpec("base", PatternSpec("sliding_window"), density=0.25, block_size=16)
SPEC = TrialSpec("speed", (WINDOW,), seq_len=256, num_layers=2, num_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def worker():
    return Worker(repeats=5, budget_s=0.05)


def test_a_speed_trial_measures_all_that_a_record_asks(worker):
    found = worker.run(replace(SPEC, task_params={"error_len": 64}))
    layout = patterns.build("sliding_window").layout(256, q_block_size=16, causal=True, density=0.25)
    assert found.density == layout.density
    for name in ("forward_ms", "forward_backward_ms"):
        p20, p50, p80 = (getattr(found, f"{name}_{quantile}") for quantile in ("p20", "p50", "p80"))
        assert 0 < p20 <= p50 <= p80
    assert found.forward_ms_p20 < found.forward_backward_ms_p80
    assert found.dense_forward_ms_p50 > 0
    assert found.dense_forward_backward_ms_p50 > 0
    assert min(found.peak_bytes, found.dense_peak_bytes) > 4 * 2 * 256 * 16 * 4, "dq, dk, dv and the result at least"
    assert 0 < found.error_forward < 1e-5
    assert 0 < found.error_gradient < 1e-4
    assert (found.device, found.num_threads) == ("cpu", torch.get_num_threads())
    assert found.device_name
    assert (found.quality, found.quality_name, found.curves) == (None, None, ())


def test_a_task_with_quality_is_trained_and_timed(worker):
    spec = replace(SPEC, task="recall", train_len=32, train_steps=3, num_layers=1)
    found = worker.run(spec)
    assert (found.quality_name, found.quality_goal) == ("recall_accuracy", "max")
    assert 0 <= found.quality <= 1
    assert len(found.curves) == 3
    assert found.train_seconds > 0
    assert found.forward_backward_ms_p50 > 0


def test_a_question_asked_for_more_steps_goes_on_and_is_timed_once(worker):
    spec = replace(SPEC, task="recall", train_len=32, train_steps=6, num_layers=1)
    timed = worker.run(spec, 0)
    assert (timed.quality, timed.trained_steps) == (None, None)
    half, whole = worker.run(spec, 3), worker.run(spec)
    assert (half.trained_steps, whole.trained_steps) == (3, 6)
    assert timed.forward_ms_p50 == half.forward_ms_p50 == whole.forward_ms_p50
    assert whole.train_seconds > half.train_seconds
    again = worker.run(spec)
    assert again.quality == whole.quality
    assert again.forward_ms_p50 != whole.forward_ms_p50, "a question that was answered is measured anew"


def test_a_preview_is_judged_with_the_weights_of_another_training_and_neither_trained_nor_timed(tmp_path):
    dense = replace(SPEC, task="recall", train_len=32, train_steps=6, num_layers=1, attention=(AttentionSpec("dense"),))
    path = str(tmp_path / "weights" / "dense.pt")
    trained = Worker(repeats=5, budget_s=0.05, keep={dense.digest: path}).run(dense)
    worker = Worker()
    own, other = (replace(spec, task_params={"weights": path}) for spec in (dense, replace(dense, attention=(WINDOW,))))
    found = worker.run(own)
    assert (found.quality, found.trained_steps, found.forward_ms_p50) == (trained.quality, 0, None)
    assert worker.run(other).density < 1
    learned = replace(WINDOW, variant="adaptive", pattern=PatternSpec("adaptive"))
    with pytest.raises(ValueError, match="do not fit the model"):
        worker.run(replace(other, attention=(learned,)))
    with pytest.raises(ValueError, match="only what is trained can be previewed"):
        worker.run(replace(SPEC, task_params={"weights": path}))


def test_what_cannot_be_timed_is_not_trained(worker, monkeypatch):
    monkeypatch.setattr(Training, "advance", lambda self, step=None: pytest.fail("it trained"))
    spec = replace(SPEC, task="recall", train_len=32, train_steps=3, seq_len=100, num_layers=1)
    with pytest.raises(NotImplementedError):
        worker.run(replace(spec, attention=(replace(WINDOW, backend="triton"),), dtype="float64"))


def test_density_is_the_mean_over_the_layers(worker):
    mixed = replace(SPEC, attention=(WINDOW, AttentionSpec("dense")))
    found, alone = worker.run(mixed), worker.run(SPEC)
    assert found.density == pytest.approx((1 + alone.density) / 2)


def test_the_timed_stack_calls_every_layer():
    q, k, v = synthetic_qkv(SPEC, "cpu")
    mixed = replace(SPEC, attention=(WINDOW, AttentionSpec("dense")))
    parts = [AttentionStack(replace(SPEC, attention=(one,), num_layers=1))(q, k, v) for one in mixed.attention]
    torch.testing.assert_close(AttentionStack(mixed)(q, k, v), parts[0] + parts[1])


def test_synthetic_inputs_are_normal_and_do_not_depend_on_the_other_sizes():
    large = replace(SPEC, batch=2, num_heads=4, num_kv_heads=2, seq_len=512)
    for big, small in zip(synthetic_qkv(large, "cpu"), synthetic_qkv(SPEC, "cpu"), strict=True):
        assert torch.equal(big[:1, :2, :256], small)
        assert abs(float(big.mean())) < 0.02
        assert float(big.std()) == pytest.approx(1, abs=0.02)
    q, k, v = synthetic_qkv(SPEC, "cpu")
    assert not torch.equal(q, k)
    assert not torch.equal(k, v)
    assert not torch.equal(q, synthetic_qkv(replace(SPEC, seed=1), "cpu")[0])


def test_an_inexact_attention_shows_in_the_errors(monkeypatch):
    """A module that keeps other blocks than asked, beside the reference that keeps the right ones."""
    exact = relative_errors(SPEC, 64, torch.device("cpu"))
    other = replace(SPEC, attention=(replace(WINDOW, density=1.0),))

    def wrong_module(spec, index):
        return timed_attention(spec if spec.layer(0).backend == "reference" else other, index)

    monkeypatch.setattr("raybsa.tasks.exactness.timed_attention", wrong_module)
    wrong = relative_errors(SPEC, 64, torch.device("cpu"))
    assert max(exact) < 1e-4
    assert min(wrong) > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "chess"}, "unknown task 'chess'; there are byte_lm, recall, .*speed, or your own"),
        ({"task_params": {"distance": 3}}, r"knows the parameters \['error_len'\], got also \['distance'\]"),
        ({"attention": (AttentionSpec("base", PatternSpec("no_such")),)}, "unknown pattern 'no_such'"),
        ({"attention": (AttentionSpec("best", PatternSpec("random")),)}, "variant must be one of .*, got 'best'"),
    ],
)
def test_a_question_about_what_does_not_exist_is_refused(worker, change, message):
    with pytest.raises(ValueError, match=message):
        worker.run(replace(SPEC, **change))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_worker_needs_a_cuda_device():
    with pytest.raises(ValueError, match="asked for a CUDA device"):
        Worker("cuda")
