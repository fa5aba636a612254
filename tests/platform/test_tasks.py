"""Tasks: quality means what it says. Known texts cost what they must, and recall needs the pattern that reaches."""

from dataclasses import replace

import pytest
import torch

from raybsa.spec import AttentionSpec, PatternSpec, TrialSpec
from raybsa.tasks import byte_lm, recall
from raybsa.tasks.optimizer import AdamW
from raybsa.tasks.training import IGNORE, Training, learning_rates
from raybsa.timing import DeviceLock

CPU = torch.device("cpu")
TEXT = TrialSpec(
    "byte_lm",
    (AttentionSpec("dense"),),
    train_len=64,
    train_steps=60,
    num_layers=1,
    num_heads=2,
    head_dim=16,
    learning_rate=1e-2,
)
RECALL = TrialSpec(
    "recall",
    (AttentionSpec("dense"),),
    train_len=64,
    train_steps=100,
    num_layers=1,
    num_heads=1,
    head_dim=32,
    learning_rate=1e-2,
    task_params={"distance": 32},
)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose by a second thread, and many times over where a neighbour computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lock(tmp_path):
    return DeviceLock("cpu", str(tmp_path))


def judged(task, spec, device, lock):
    """The quality after the whole training."""
    return task.prepare_training(spec, device, lock).advance()


def with_text(tmp_path, text, **changes):
    path = tmp_path / f"text-{len(text)}"
    path.write_bytes(bytes(text))
    return replace(TEXT, task_params={"text": str(path), "eval_windows": 4}, **changes)


# ---- byte_lm -------------------------------------------------------------------------------------------------------


def test_a_text_that_repeats_costs_almost_nothing_and_noise_costs_eight_bits(tmp_path, lock):
    noise = torch.randint(256, (20_000,)).tolist()
    repeated = judged(byte_lm, with_text(tmp_path, b"abcdefgh" * 500), CPU, lock)
    random = judged(byte_lm, with_text(tmp_path, noise, train_steps=10, learning_rate=1e-3), CPU, lock)
    assert repeated.value < 0.2
    assert 7.9 < random.value < 8.7
    assert (random.name, random.goal) == ("bits_per_byte", "min")


def test_a_model_that_knows_nothing_costs_eight_bits(lock):
    flat = torch.nn.Module()
    flat.forward = lambda tokens: torch.zeros(*tokens.shape, 256)
    tokens = torch.randint(256, (9, 16))
    bits = byte_lm.bits_per_byte(flat, tokens, tokens, torch.enable_grad(), lock)
    assert bits == pytest.approx(8.0, abs=1e-5)


def test_the_same_seed_gives_the_same_answer_and_curve(tmp_path, lock):
    spec = with_text(tmp_path, torch.randint(97, 100, (5_000,)).tolist(), train_steps=8)
    torch.rand(7)
    first, second = (judged(byte_lm, spec, CPU, lock) for _ in range(2))
    other = judged(byte_lm, replace(spec, seed=1), CPU, lock)
    assert (first.value, first.curves) == (second.value, second.curves)
    assert other.value != first.value


def test_the_curve_runs_from_the_first_step_to_the_last(tmp_path, lock):
    quality = judged(byte_lm, with_text(tmp_path, b"ab" * 2000, train_steps=7), CPU, lock)
    assert [(name, step) for name, step, _ in quality.curves] == [("train_loss", step) for step in range(7)]
    assert quality.curves[-1][2] < quality.curves[0][2]
    assert quality.train_seconds > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": False}, "must be causal, got causal=False"),
        ({"train_len": 4000}, "train text must be longer than train_len 4000, got 3600 bytes"),
        ({"train_len": 512}, "held-out text must be longer than train_len 512, got 400 bytes"),
        ({"dtype": "float16"}, "float32, float64 or bfloat16, got float16"),
        (
            {"task_params": {"texts": "x"}},
            r"knows the parameters \['eval_seed', 'eval_windows', 'text', .*'texts'",
        ),
    ],
)
def test_byte_lm_refuses_what_it_cannot_do(tmp_path, lock, change, message):
    with pytest.raises(ValueError, match=message):
        judged(byte_lm, replace(with_text(tmp_path, b"ab" * 2000), **change), CPU, lock)


# ---- recall --------------------------------------------------------------------------------------------------------


def sparse(name, **params):
    return replace(RECALL, attention=(AttentionSpec("base", PatternSpec(name, params), block_size=16),))


def test_a_pattern_that_reaches_the_distance_learns_to_recall(lock):
    reaches = judged(recall, sparse("strided", stride=2), CPU, lock)
    assert reaches.value > 0.8
    assert (reaches.name, reaches.goal) == ("recall_accuracy", "max")


def test_a_pattern_that_does_not_reach_stays_at_chance(lock):
    assert judged(recall, sparse("sliding_window", window=1), CPU, lock).value < 0.25


def test_every_query_asks_for_the_pair_that_lies_the_distance_before_it():
    tokens, targets = recall.sequences(seed=3, step=5, count=20, length=100, distance=40)
    asked = (targets != IGNORE).nonzero()
    assert len(asked) == 20 * recall.KEYS
    for row, place in asked.tolist():
        pair, query = int(tokens[row, place - 40]), int(tokens[row, place])
        assert pair // recall.VALUES == query - recall.KEYS * recall.VALUES
        assert int(targets[row, place]) == recall.VOCABULARY - recall.VALUES + pair % recall.VALUES
    assert int(tokens.max()) < recall.VOCABULARY - recall.VALUES, "no input gives an answer away"


def test_steps_and_seeds_give_other_sequences_and_the_same_give_the_same():
    drawn = [recall.sequences(seed, step, 4, 64, 32)[0] for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert drawn[0].equal(drawn[3])
    assert not any(drawn[0].equal(other) for other in drawn[1:3])


@pytest.mark.parametrize("distance", [7, 57])
def test_a_distance_without_room_for_the_keys_is_refused(lock, distance):
    with pytest.raises(ValueError, match=rf"distance must lie in 8\.\.56 for 8 keys, got {distance}"):
        judged(recall, replace(RECALL, task_params={"distance": distance}), CPU, lock)


# ---- training ------------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    rates = list(learning_rates(100, 1.0))
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[-1] == pytest.approx(0.1, abs=1e-2)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_optimizer_makes_the_steps_of_torch_s_own_to_the_bit(set_to_none):
    ends = []
    for make in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        optimizer = make(model.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.01)
        for _ in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()
        ends.append([*model.parameters(), *(state["exp_avg_sq"] for state in optimizer.state.values())])
    assert all(torch.equal(own, wanted) for own, wanted in zip(*ends, strict=True))


def test_training_lets_a_timer_in_between_two_steps(lock):
    """Every step takes the lock anew, and holds it while it computes."""
    held = []

    class Counting:
        def shared(self):
            held.append("taken")
            return lock.shared()

    model = torch.nn.Embedding(4, 4)
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    training = Training(
        model,
        lambda step: (tokens, tokens),
        lambda: 0.5,
        name="q",
        goal="min",
        steps=3,
        learning_rate=0.1,
        lock=Counting(),
        context=torch.enable_grad(),
    )
    training.advance(2)
    assert held == ["taken"] * 2
    assert training.advance().steps == 3
    assert held == ["taken"] * 3


@pytest.mark.parametrize("task", [byte_lm, recall])
def test_a_training_that_halts_on_its_way_ends_as_one_that_does_not(tmp_path, lock, task):
    spec = with_text(tmp_path, torch.randint(97, 100, (5_000,)).tolist(), train_steps=6)
    spec = replace(RECALL, train_steps=6) if task is recall else spec
    whole, halting = (task.prepare_training(spec, CPU, lock) for _ in range(2))
    first, wanted = halting.advance(2), whole.advance()
    found = halting.advance()
    assert (first.steps, found.steps) == (2, 6)
    assert found.value == wanted.value
    assert [point for point in found.curves if point[0] == "train_loss"] == list(wanted.curves)
    assert [point[1:] for point in found.curves if point[0] == found.name] == [(2, first.value), (6, found.value)]


@pytest.mark.parametrize("task", [byte_lm, recall])
def test_another_evaluation_seed_asks_about_other_data_and_trains_the_same(tmp_path, lock, task):
    spec = with_text(tmp_path, torch.randint(97, 100, (9_000,)).tolist(), train_steps=4)
    spec = replace(RECALL, train_steps=4) if task is recall else spec
    fresh = replace(spec, task_params={**spec.task_params, "eval_seed": 1})
    found, other = (judged(task, one, CPU, lock) for one in (spec, fresh))
    assert found.curves == other.curves
    assert found.value != other.value
