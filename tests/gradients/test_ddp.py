"""The hook for torch's DistributedDataParallel, in two processes on gloo with several buckets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raybsa.comm import Cancelled, Communicator
from raybsa.gradients import State, build
from raybsa.gradients.ddp import _answer
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent.parent
LOSSY = ["fp16", "bf16", "int8", "topk", "powersgd"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of the two processes saved: a dict of runs, by codec."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-W", "error", "-m", "tests.gradients.ddp_program"]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder / "store"), str(folder / f"{rank}.pt")], cwd=ROOT)
        for rank in range(2)
    ]
    try:
        assert [process.wait(90) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_uncompressed_it_gives_the_bits_of_ddp_itself(ranks: list[dict]) -> None:
    for result in ranks:
        pairs = zip(result["plain"]["weights"], result["none"]["weights"], strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
        assert result["plain"]["losses"] == result["none"]["losses"]


@pytest.mark.parametrize("codec", LOSSY)
def test_a_lossy_hook_trains_and_ranks_end_alike(ranks: list[dict], codec: str) -> None:
    first, second = (result[codec] for result in ranks)
    assert all(torch.equal(x, y) for x, y in zip(first["weights"], second["weights"], strict=True))
    for result in ranks:
        losses, plain = result[codec]["losses"], result["plain"]["losses"]
        assert losses[1] == plain[1], "the first step is a warm-up"
        assert losses != plain
        assert losses[-1] < 0.75 * losses[0]
        assert losses[-1] < 1.1 * plain[-1]
        assert result[codec]["residuals"] > 0


def test_after_a_failed_bucket_every_later_one_fails_at_once() -> None:
    def work(communicator: Communicator) -> list[str]:
        told = []
        for codec in ("int8", "none"):
            future: torch.futures.Future = torch.futures.Future()
            buffer = torch.ones(4, dtype=torch.float64)
            _answer(future, build(codec), buffer, [buffer], [State()], communicator)
            with pytest.raises((ValueError, Cancelled)) as error:
                future.wait()
            told.append(str(error.value))
        return told

    for first, later in run_ranks(2, work):
        assert "codec int8 takes gradients in float32, bfloat16, float16, got float64" in first
        assert "was told to stop: a gradient exchange failed: codec int8 takes" in later
