"""One suite that every codec passes: what it loses, what it remembers, what it costs, and that ranks end alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from raybsa.comm import Communicator
from raybsa.gradients import CATALOG, Codec, State, build
from raybsa.gradients.codec import wide
from raybsa.gradients.wire import KIND
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Case:
    """A codec and its budgets, relative to the mean square of normal numbers (64, 96).

    ``loss`` is the mean squared error of one round trip, ``late`` what error feedback may still owe after 60 steps.
    """

    name: str
    loss: float
    late: float
    params: dict = field(default_factory=dict)

    @property
    def label(self) -> str:
        return "-".join([self.name, *(value for value in self.params.values() if isinstance(value, str))])

    @property
    def codec(self) -> Codec:
        return build(self.name, **self.params)


CASES = [
    Case("none", 0.0, 0.0),
    Case("fp16", 1e-7, 1e-5),
    Case("bf16", 6e-6, 1e-4),
    Case("int8", 2e-4, 1e-3, {"block_size": 64}),
    Case("topk", 0.58, 0.1, {"density": 0.1}),
    Case("powersgd", 0.92, 0.25, {"rank": 4}),
    Case("powersgd", 0.92, 0.25, {"rank": 4, "wire": "bfloat16"}),
    Case("powersgd", 0.92, 0.25, {"rank": 4, "wire": "int8"}),
]
every_codec = pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
LOSSY = pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.label)
TENSORS: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(33, 65),
    "vector": lambda: torch.randn(130),
    "scalar": lambda: torch.randn(()),
    "one": lambda: torch.randn(1, 1),
    "empty": lambda: torch.empty(0),
    "empty matrix": lambda: torch.empty(5, 0),
    "convolution": lambda: torch.randn(24, 3, 7, 7),
    "transposed": lambda: torch.randn(65, 33).mT,
    "strided": lambda: torch.randn(40, 80)[::2, 1::2],
    "expanded": lambda: torch.randn(40, 1).expand(40, 60),
    "zeros": lambda: torch.zeros(40, 60),
}


def noise(rank: int, step: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * rank + step))


def test_the_suite_runs_every_codec() -> None:
    assert list(dict.fromkeys(case.name for case in CASES)) == list(CATALOG)


@every_codec
def test_a_round_trip_loses_no_more_than_its_budget(case: Case) -> None:
    x = torch.randn(64, 96)
    lost = (case.codec.extract(case.codec.compress(x, State())) - x).square().mean() / x.square().mean()
    assert lost <= case.loss, f"mean squared error {lost:.3g}, budget {case.loss:.3g}"


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_tensor_comes_back_in_its_shape_and_dtype_or_is_refused(case: Case, dtype: torch.dtype) -> None:
    codec = case.codec
    for name, make in TENSORS.items():
        x = make().to(dtype)
        if dtype not in codec.dtypes:
            with pytest.raises(ValueError, match=f"codec {codec.name} takes gradients in .*, got {str(dtype)[6:]}"):
                codec.compress(x, State())
            continue
        before = x.clone()
        payload = codec.compress(x, State())
        back = codec.extract(payload)
        assert (back.shape, back.dtype) == (x.shape, x.dtype), name
        assert torch.equal(x, before), f"{name}: compress wrote to its input"
        assert (back - x).double().norm() <= 1.001 * x.double().norm(), f"{name}: worse than sending nothing"
        (total,) = codec.exchange([x], [State()], Communicator())
        assert torch.equal(total.to(dtype), back), f"{name}: alone, the sum is what was sent"


@LOSSY
def test_with_error_feedback_all_arrives_in_the_end(case: Case) -> None:
    """After T steps the sum of what was sent is the sum of the inputs but for the residual, which stays bounded."""
    codec, state, steps = case.codec, State(), 60
    base = torch.randn(64, 96)
    wanted, sent = torch.zeros(64, 96, dtype=torch.float64), torch.zeros(64, 96, dtype=torch.float64)
    for step in range(steps):
        x = base + 0.1 * noise(0, step, 64, 96)
        wanted += x
        sent += codec.extract(codec.compress(x, state))
    assert state.step == steps
    owed = (wanted - sent).norm()
    assert state.norm() == pytest.approx(float(owed), rel=1e-3, abs=1e-4), "the residual is what is owed"
    assert owed / wanted.norm() <= case.late, f"owes {owed / wanted.norm():.3g} of the sum, budget {case.late:.3g}"


@LOSSY
def test_without_error_feedback_nothing_is_remembered(case: Case) -> None:
    codec = build(case.name, error_feedback=False, **case.params)
    state = State()
    codec.compress(torch.randn(64, 96), state)
    assert state.residual is None
    assert state.norm() == 0.0


@pytest.mark.parametrize("world_size", [2, 3])
@every_codec
def test_all_ranks_end_with_the_same_bits_of_the_sum_of_what_was_sent(case: Case, world_size: int) -> None:
    shapes = [(24, 40), (7,), (16, 3, 5), (0,), ()]

    def work(communicator: Communicator) -> tuple[list[list[Tensor]], list[Tensor]]:
        codec, rank = case.codec, communicator.rank
        states = [State(tensor=i, rank=rank) for i in range(len(shapes))]
        alike, totals, wanted = [], [], [torch.zeros(shape) for shape in shapes]
        for step in range(4):
            inputs = [noise(rank, 10 * step + i, *shape) for i, shape in enumerate(shapes)]
            totals.append(codec.exchange(inputs, states, communicator))
            alike += inputs
            wanted = [w + x for w, x in zip(wanted, inputs, strict=True)]
        owed = [w if s.residual is None else w - s.residual for w, s in zip(wanted, states, strict=True)]
        return totals, owed

    results = run_ranks(world_size, work)
    for totals, _ in results[1:]:
        for ours, first in zip(totals, results[0][0], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(ours, first, strict=True))
    for i in range(len(shapes)):
        arrived = sum(step[i] for step in results[0][0])
        sent = sum(owed[i] for _, owed in results)
        # A 16-bit sum rounds once more where ranks are added up; the residuals know nothing of that.
        close = {"fp16": 1e-2, "bf16": 1e-1, "powersgd-bfloat16": 1e-1}.get(case.label, 1e-4)
        torch.testing.assert_close(arrived, sent, atol=close, rtol=0.0)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in case.codec.dtypes],
    ids=lambda each: each.name if isinstance(each, Case) else str(each),
)
def test_nbytes_is_what_the_payload_holds_and_the_ledger_counts(case: Case, dtype: torch.dtype) -> None:
    codec = case.codec
    shapes = [(24, 40), (7,), ()]

    def work(communicator: Communicator) -> tuple[int, int, int]:
        inputs = [noise(communicator.rank, i, *shape).to(dtype) for i, shape in enumerate(shapes)]
        payloads = [codec.compress(x, State()) for x in inputs]
        for payload in payloads:
            held = sum(x.numel() * x.element_size() for x in payload.tensors)
            assert codec.nbytes(payload) == held > 0
        codec.exchange(inputs, [State() for _ in inputs], communicator)
        ledger = communicator.ledger
        return sum(map(codec.nbytes, payloads)), ledger.sent[KIND], ledger.received[KIND]

    messages = 2 if case.name == "powersgd" else 1
    for nbytes, sent, received in run_ranks(3, work):
        assert sent == received or case.label == "powersgd-int8"
        if case.name in ("int8", "topk"):
            assert sent == 2 * nbytes, "gathered: to each of the two others"
        elif case.label == "powersgd-int8":
            assert abs(sent - 4 * nbytes / 3) <= messages * 2 * (64 + 2), "summed: a ring's share, in whole blocks"
        else:
            assert 0 <= 4 * nbytes / 3 - sent < messages, "summed: a ring's share, rounded down once a message"


@every_codec
def test_a_saved_state_goes_on_bit_for_bit(case: Case) -> None:
    codec, state = case.codec, State(tensor=3, rank=1)
    for step in range(3):
        codec.compress(noise(0, step, 40, 60), state)
    again = State(tensor=3, rank=1)
    again.load_state_dict(state.state_dict())
    for step in range(3, 6):
        sent, resent = (codec.compress(noise(0, step, 40, 60), each) for each in (state, again))
        assert all(torch.equal(x, y) for x, y in zip(sent.tensors, resent.tensors, strict=True))
    assert again.norm() == state.norm()


@every_codec
def test_a_snapshot_is_not_changed_by_later_steps(case: Case) -> None:
    codec, state = case.codec, State()
    codec.compress(noise(0, 0, 40, 60), state)
    snapshot = state.copy()
    kept = [x.clone() for x in (snapshot.residual, *snapshot.memory.values()) if x is not None]
    sent = codec.compress(noise(0, 1, 40, 60), state)
    now = [x for x in (snapshot.residual, *snapshot.memory.values()) if x is not None]
    assert all(torch.equal(x, y) for x, y in zip(kept, now, strict=True))
    resent = codec.compress(noise(0, 1, 40, 60), snapshot)
    assert all(torch.equal(x, y) for x, y in zip(sent.tensors, resent.tensors, strict=True)), "a step can be repeated"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@every_codec
def test_what_is_not_finite_reaches_every_rank_and_is_forgotten_after_the_step(case: Case, bad: float) -> None:
    def work(communicator: Communicator) -> tuple[Tensor, State, Tensor]:
        codec, rank = case.codec, communicator.rank
        states = [State(rank=rank)]
        codec.exchange([noise(rank, 0, 40, 60)], states, communicator)
        x = noise(rank, 1, 40, 60)
        if rank == 1:
            x[3, 5] = bad
        (broken,) = codec.exchange([x], states, communicator)
        (after,) = codec.exchange([noise(rank, 2, 40, 60)], states, communicator)
        return broken, states[0], after

    for broken, state, after in run_ranks(2, work):
        assert not broken[3, 5].isfinite()
        assert after.isfinite().all()
        assert all(x.isfinite().all() for x in (state.residual, *state.memory.values()) if x is not None)


@every_codec
def test_a_spec_builds_the_codec_again(case: Case) -> None:
    assert case.codec.spec["name"] == case.name
    assert build(case.codec.spec) == case.codec


def test_wide_is_at_least_float32() -> None:
    assert [wide(x) for x in (torch.float16, torch.float64)] == [torch.float32, torch.float64]
