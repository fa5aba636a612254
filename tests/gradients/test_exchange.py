"""The exchange: buckets in one order, started in backward, cancellable, and all ranks end with the same bits."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from raybsa.comm import Cancelled, Communicator, Phase
from raybsa.gradients import GradientExchange
from raybsa.gradients.buckets import make_buckets
from tests.ranks import run_ranks

CODECS = ["none", "bf16", "int8", "topk", {"name": "powersgd", "params": {"rank": 2}}]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda c: c if isinstance(c, str) else c["name"])
SMALL = 300


def model_of(seed: int = 0) -> nn.Module:
    """Three layers whose gradients fill more than one bucket of ``SMALL`` bytes; the same on every rank."""
    sizes, generator = [12, 20, 20, 4], torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def batch_of(rank: int, step: int = 0) -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(100 * step + rank))


def gradients_of(model: nn.Module, rank: int, step: int = 0) -> list[Tensor]:
    model.zero_grad()
    model(batch_of(rank, step)).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


# ---- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mean", [True, False])
def test_uncompressed_gradients_are_the_mean_or_sum_of_the_ranks(world_size: int, mean: bool) -> None:
    def work(communicator: Communicator) -> list[Tensor]:
        model = model_of()
        exchange = GradientExchange(model.named_parameters(), "none", communicator, bucket_bytes=SMALL, mean=mean)
        assert len(exchange.buckets) >= 3
        model(batch_of(communicator.rank)).square().mean().backward()
        exchange.finish()
        exchange.close()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    results = run_ranks(world_size, work)
    wanted = [gradients_of(model_of(), rank) for rank in range(world_size)]
    for i, first in enumerate(results[0]):
        total = sum(each[i] for each in wanted) / (world_size if mean else 1)
        torch.testing.assert_close(first, total)
        assert all(torch.equal(first, other[i]) for other in results)


@pytest.mark.parametrize("bucket_bytes", [1, SMALL, 10**9])
@every_codec
def test_ranks_end_bit_identical_over_steps_with_any_number_of_buckets(codec: str | dict, bucket_bytes: int) -> None:
    def work(communicator: Communicator) -> list[Tensor]:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        exchange = GradientExchange(model.named_parameters(), codec, communicator, bucket_bytes=bucket_bytes)
        for step in range(4):
            gradients_of(model, communicator.rank, step)
            exchange.finish()
            optimizer.step()
        exchange.close()
        return [parameter.detach() for parameter in model.parameters()]

    results = run_ranks(3, work)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
    assert not torch.equal(results[0][0], next(iter(model_of().parameters()))), "the model must have moved"


@every_codec
def test_overlap_changes_no_bit(codec: str | dict) -> None:
    def work(communicator: Communicator) -> list[list[Tensor]]:
        made = []
        for overlap in (True, False):
            model = model_of()
            exchange = GradientExchange(
                model.named_parameters(), codec, communicator, bucket_bytes=SMALL, overlap=overlap
            )
            for step in range(2):
                gradients_of(model, communicator.rank, step)
                exchange.finish()
            exchange.close()
            made.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        return made

    for overlapped, after in run_ranks(2, work):
        assert all(torch.equal(x, y) for x, y in zip(overlapped, after, strict=True))


def test_warm_up_steps_are_sent_uncompressed_and_then_no_more() -> None:
    def work(communicator: Communicator) -> list[int]:
        model = model_of()
        exchange = GradientExchange(model.named_parameters(), "topk", communicator, warmup_steps=2)
        sent = []
        for step in range(4):
            communicator.ledger.clear()
            gradients_of(model, communicator.rank, step)
            exchange.finish()
            sent.append(communicator.ledger.sent["gradient"])
            assert (exchange.residual_norm() > 0) == (step >= 2)
        exchange.close()
        return sent

    whole = sum(parameter.nbytes for parameter in model_of().parameters())
    for sent in run_ranks(2, work):
        kept = sum(8 * max(1, round(0.01 * p.numel())) for p in model_of().parameters())
        assert sent == [whole, whole, kept, kept]


def test_gradients_accumulate_under_no_sync() -> None:
    def work(communicator: Communicator) -> list[Tensor]:
        model = model_of()
        exchange = GradientExchange(model.named_parameters(), "none", communicator, bucket_bytes=SMALL)
        with exchange.no_sync():
            model(batch_of(communicator.rank, 0)).square().mean().backward()
        assert communicator.ledger.sent["gradient"] == 0
        model(batch_of(communicator.rank, 1)).square().mean().backward()
        exchange.finish()
        exchange.close()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    wanted = [[gradients_of(model_of(), rank, step) for rank in range(2)] for step in range(2)]
    for result in run_ranks(2, work):
        for i, got in enumerate(result):
            total = sum(wanted[step][rank][i] for step in range(2) for rank in range(2)) / 2
            torch.testing.assert_close(got, total)


def test_a_second_backward_without_no_sync_is_refused() -> None:
    model = model_of()
    exchange = GradientExchange(model.named_parameters(), "none", Communicator())
    model(batch_of(0)).mean().backward()
    with pytest.raises(RuntimeError, match=r"a second gradient of 2\.\w+ before finish\(\): accumulate inside no_sync"):
        model(batch_of(0)).mean().backward()
    exchange.close()
    model(batch_of(0)).mean().backward()  # and its hooks are gone


# ---- unused parameters, and readiness in another order -------------------------------------------------------------


class Branches(nn.Module):
    """Four vectors used in a given order; backward reaches the one used last first."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.full((50,), float(i))) for i in range(4)])

    def forward(self, order: list[int]) -> Tensor:
        total = torch.zeros(())
        for i in order:
            total = total * 1.0 + (self.parts[i] * (i + 1.0)).sum()
        return total


@pytest.mark.parametrize("codec", ["none", "int8", "topk"])
def test_a_parameter_without_a_gradient_counts_as_zeros_on_every_rank(codec: str) -> None:
    used = [[0, 2, 3], [0, 1, 2]]

    def work(communicator: Communicator) -> list[Tensor | None]:
        model = Branches()
        params = {"density": 1.0} if codec == "topk" else {}
        exchange = GradientExchange(
            model.named_parameters(), {"name": codec, "params": params}, communicator, bucket_bytes=1
        )
        model(used[communicator.rank]).backward()
        exchange.finish()
        exchange.close()
        return [part.grad for part in model.parts]

    results = run_ranks(2, work)
    for i, wanted in enumerate([1.0, 1.0, 3.0, 2.0]):
        assert torch.equal(results[0][i], results[1][i])
        torch.testing.assert_close(results[0][i], torch.full((50,), wanted), rtol=1e-2, atol=0.0)


def test_a_parameter_that_no_rank_used_ends_with_zeros_and_one_that_is_frozen_with_none() -> None:
    def work(communicator: Communicator) -> tuple[Tensor | None, Tensor | None]:
        model = Branches()
        model.parts[2].requires_grad_(False)
        exchange = GradientExchange(model.named_parameters(), "none", communicator)
        model([0, 2, 3]).backward()
        exchange.finish()
        exchange.close()
        return model.parts[1].grad, model.parts[2].grad

    for unused, frozen in run_ranks(2, work):
        assert unused is not None
        assert not unused.any()
        assert frozen is None


def test_buckets_go_in_one_order_though_ranks_reach_them_in_another() -> None:
    orders = [[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 0, 1]]

    def work(communicator: Communicator) -> tuple[list[int], list[float]]:
        model, reached = Branches(), []
        exchange = GradientExchange(model.named_parameters(), "none", communicator, bucket_bytes=1)
        assert [bucket.names for bucket in exchange.buckets] == [(f"parts.{i}",) for i in (3, 2, 1, 0)]
        for i, part in enumerate(model.parts):
            part.register_post_accumulate_grad_hook(lambda _, i=i: reached.append(i))
        (model(orders[communicator.rank]) * (communicator.rank + 1)).backward()
        exchange.finish()
        exchange.close()
        return reached, [float(part.grad[0]) for part in model.parts if part.grad is not None]

    results = run_ranks(3, work)
    assert [reached for reached, _ in results] == [order[::-1] for order in orders], "ranks must differ, or it is easy"
    assert all(got == [2.0, 4.0, 6.0, 8.0] for _, got in results)


# ---- overlap -------------------------------------------------------------------------------------------------------


def test_early_buckets_arrive_while_backward_still_runs() -> None:
    def work(communicator: Communicator) -> list[bool]:
        model = model_of()
        exchange = GradientExchange(model.named_parameters(), "none", communicator, bucket_bytes=1)
        bias, seen = model[2].bias, []
        own = gradients_of(model_of(), communicator.rank)[-1]
        hidden = model[:2](batch_of(communicator.rank))
        # Runs after the last layer's backward and before the others': by then its bucket must come back changed.
        hidden.register_hook(lambda _: seen.append(until(lambda: not torch.equal(bias.grad, own))))
        model[2](hidden).square().mean().backward()
        exchange.finish()
        exchange.close()
        return seen

    assert run_ranks(2, work) == [[True], [True]]


def test_backward_does_not_wait_for_other_ranks() -> None:
    first_is_through = threading.Event()

    def work(communicator: Communicator) -> bool:
        model = model_of()
        exchange = GradientExchange(model.named_parameters(), "none", communicator, bucket_bytes=1)
        came = first_is_through.wait(20.0) if communicator.rank == 1 else True
        model(batch_of(communicator.rank)).square().mean().backward()
        first_is_through.set()
        exchange.finish()
        exchange.close()
        return came

    assert run_ranks(2, work) == [True, True], "rank 0 must end its backward before rank 1 begins to send"


# ---- failures ------------------------------------------------------------------------------------------------------


def test_a_cancelled_communicator_frees_the_exchange_and_undoes_the_step() -> None:
    leave = threading.Event()

    def work(communicator: Communicator) -> tuple[float, float, float, int]:
        model = model_of()
        exchange = GradientExchange(model.named_parameters(), "topk", communicator, bucket_bytes=1)
        gradients_of(model, communicator.rank)
        exchange.finish()
        before = exchange.residual_norm()
        if communicator.rank == 1:
            leave.wait(20.0)
            return 0.0, before, before, exchange.step
        gradients_of(model, communicator.rank, 1)
        cancelled_at = []

        def cancel() -> None:
            cancelled_at.append(time.perf_counter())
            communicator.cancel("a test")

        threading.Timer(0.3, cancel).start()
        with pytest.raises(Cancelled, match="rank 0 was told to stop: a test"):
            exchange.finish()
        freed = time.perf_counter() - cancelled_at[0]
        with pytest.raises(Cancelled):
            exchange.finish()
        leave.set()
        return freed, before, exchange.residual_norm(), exchange.step

    freed, before, after, step = run_ranks(2, work)[0]
    assert freed < 10.0, "a rank that was cancelled must not wait for its peer"
    assert before == after > 0.0
    assert step == 1


class FaultAt:
    """Raises when the ``count``-th gradient message begins."""

    def __init__(self, count: int) -> None:
        self.left, self.fired = count, False

    def begin(self, phase: Phase, kind: str, hop: int) -> None:
        if phase is Phase.TRANSFER and kind == "gradient":
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise RuntimeError("injected")

    def end(self, phase: Phase, kind: str, hop: int) -> None: ...


@every_codec
def test_a_step_that_failed_half_way_can_be_repeated_bit_for_bit(codec: str | dict) -> None:
    """Rank 0 fails at the second bucket of the second step; both go on from what they remember, on a new group."""

    def generation(steps: Iterable[int], saved: list[dict], fault: FaultAt | None) -> list[tuple[dict, list[Tensor]]]:
        communicators: dict[int, Communicator] = {}

        def work(communicator: Communicator) -> tuple[dict, list[Tensor]]:
            rank, model = communicator.rank, model_of()
            communicators[rank] = communicator
            exchange = GradientExchange(model.named_parameters(), codec, communicator, bucket_bytes=SMALL)
            if saved:
                exchange.load_state_dict(saved[rank])
            for step in steps:
                if step == 1 and rank == 0:
                    communicator.observer = fault
                gradients_of(model, rank, step)
                if step == 1 and fault is not None:
                    with pytest.raises((RuntimeError, Cancelled), match=r"injected|rank 0 failed"):
                        exchange.finish()
                    communicators[1].cancel("rank 0 failed")
                else:
                    exchange.finish()
            exchange.close()
            return exchange.state_dict(), [p.grad for p in model.parameters() if p.grad is not None]

        return run_ranks(2, work)

    fault = FaultAt(2)
    broken = [saved for saved, _ in generation([0, 1], [], fault)]
    assert fault.fired
    for (_, wanted), (_, got) in zip(generation([0, 1, 2], [], None), generation([1, 2], broken, None), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(wanted, got, strict=True))


def test_ranks_that_disagree_hear_of_it_in_the_first_step() -> None:
    def work(communicator: Communicator) -> str:
        model = model_of()
        codec = ["none", "fp16"][communicator.rank]
        exchange = GradientExchange(model.named_parameters(), codec, communicator)
        gradients_of(model, communicator.rank)
        with pytest.raises(ValueError, match="ranks disagree on the gradients") as error:
            exchange.finish()
        exchange.close()
        return str(error.value)

    for message in run_ranks(2, work):
        assert "rank 0 has codec {'name': 'none'" in message
        assert "rank 1 has codec {'name': 'fp16'" in message


def test_a_codec_or_device_that_does_not_fit_is_refused_before_anything_runs() -> None:
    model = model_of().double()
    with pytest.raises(ValueError, match="codec int8 takes gradients in float32, bfloat16, float16, got float64"):
        GradientExchange(model.named_parameters(), "int8", Communicator())
    with pytest.raises(ValueError, match=r"the communicator is on cpu, got \S+ on meta"):
        GradientExchange(model.to("meta").named_parameters(), "none", Communicator())
    with pytest.raises(ValueError, match="bucket_bytes must be at least 1, got 0"):
        GradientExchange(model.named_parameters(), "none", Communicator(), bucket_bytes=0)


# ---- saved state ---------------------------------------------------------------------------------------------------


@every_codec
def test_a_saved_exchange_goes_on_bit_for_bit_and_through_a_file(codec: str | dict, tmp_path: Path) -> None:
    def steps(exchange: GradientExchange, model: nn.Module, communicator: Communicator, *which: int) -> list[Tensor]:
        for step in which:
            gradients_of(model, communicator.rank, step)
            exchange.finish()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def work(communicator: Communicator) -> tuple[list[Tensor], list[Tensor]]:
        model, path = model_of(), tmp_path / f"{communicator.rank}.pt"
        exchange = GradientExchange(model.named_parameters(), codec, communicator, bucket_bytes=SMALL)
        steps(exchange, model, communicator, 0, 1)
        torch.save(exchange.state_dict(), path)
        went_on = steps(exchange, model, communicator, 2)
        exchange.close()
        again = GradientExchange(model.named_parameters(), codec, communicator, bucket_bytes=SMALL)
        again.load_state_dict(torch.load(path))
        assert again.step == 2
        loaded = steps(again, model, communicator, 2)
        again.close()
        assert again.residual_norm() == exchange.residual_norm()
        return went_on, loaded

    for went_on, loaded in run_ranks(2, work):
        assert all(torch.equal(x, y) for x, y in zip(went_on, loaded, strict=True))


def test_a_saved_exchange_of_another_codec_or_model_is_refused() -> None:
    model = model_of()
    exchange = GradientExchange(model.named_parameters(), "topk", Communicator())
    gradients_of(model, 0)
    exchange.finish()
    saved = exchange.state_dict()
    with pytest.raises(ValueError, match=r"the saved exchange used .*'none'.*, this one uses .*'topk'"):
        exchange.load_state_dict({**saved, "codec": {"name": "none"}})
    fewer = {name: state for name, state in saved["states"].items() if name != "0.bias"}
    with pytest.raises(ValueError, match=r"of another model: only one of the two has 0\.bias"):
        exchange.load_state_dict({**saved, "states": fewer})
    odd = {**saved["states"], "0.bias": {**saved["states"]["0.bias"], "residual": torch.zeros(3)}}
    with pytest.raises(ValueError, match=r"0\.bias has the shape \(20,\), its saved residual \(3,\)"):
        exchange.load_state_dict({**saved, "states": odd})
    exchange.close()


# ---- buckets -------------------------------------------------------------------------------------------------------


def test_buckets_are_filled_from_the_last_parameter_and_hold_one_dtype() -> None:
    def parameter(numel: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> nn.Parameter:
        return nn.Parameter(torch.zeros(numel, dtype=dtype), requires_grad=grad)

    named = [
        ("a", parameter(10)),
        ("b", parameter(10, torch.bfloat16)),
        ("c", parameter(10, grad=False)),
        ("d", parameter(10)),
        ("e", parameter(10, torch.bfloat16)),
        ("f", parameter(100)),
        ("g", parameter(5)),
    ]
    buckets = make_buckets(named, 80)
    assert [bucket.names for bucket in buckets] == [("g", "f"), ("d", "a"), ("e", "b")]
    assert [bucket.nbytes for bucket in buckets] == [420, 80, 40]
