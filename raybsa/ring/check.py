"""Compares a ring of real processes with one device: errors, bytes and times. Exits non-zero where one is off.

    python -m torch.distributed.run --nproc_per_node=2 -m raybsa.ring.check

On CUDA with a GPU for each process it runs NCCL, else gloo on the CPU; any world size.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raybsa import patterns
from raybsa.comm import Communicator
from raybsa.kernels.api import block_sparse_attention
from raybsa.layout import BlockLayout
from raybsa.ring.attention import ring_attention
from raybsa.ring.partition import partition_for
from raybsa.ring.plan import RingPlan

BUDGET = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
BYTES_BUDGET = 1.02
RUNS = 2  # the second is timed
K_AND_V_WENT_ROUND = 2 * RUNS  # in the forward and again in the backward


@dataclass(frozen=True)
class Case:
    """One attention; ``blocks`` a rank, so that any world size has work."""

    pattern: str
    density: float | None
    partition: str = "balanced"
    causal: bool = True
    heads: int = 4
    kv_heads: int = 4
    blocks: int = 8
    ragged: int = 0
    dtype: torch.dtype = torch.float64

    def layout(self, world_size: int, device: torch.device) -> BlockLayout:
        tokens = self.blocks * world_size * 32 - self.ragged
        rule = patterns.build(self.pattern)
        return rule.layout(
            tokens,
            num_heads=self.heads,
            q_block_size=32,
            causal=self.causal,
            density=self.density,
            device=device,
            or_least=True,
        )

    def __str__(self) -> str:
        density = "all" if self.density is None else f"{self.density:.0%}"
        heads = f"{self.heads}/{self.kv_heads}"
        return f"{self.pattern} {density} {self.partition} {'causal' if self.causal else 'two-sided'} {heads}"


CASES = (
    Case("sliding_window", 0.2, "contiguous"),
    Case("sliding_window", 0.2, causal=False),
    Case("random", 0.1, kv_heads=4),
    Case("bigbird", 0.2, kv_heads=2, ragged=13),
    Case("dense", None, "zigzag"),
    Case("dense", None, "striped", causal=False, kv_heads=1),
    Case("strided", 0.2, ragged=5, dtype=torch.float32),
    Case("random", 0.1, causal=False, blocks=32, dtype=torch.float32),
    Case("sink_window", 0.1, blocks=32, dtype=torch.bfloat16),
)


@dataclass(frozen=True)
class Outcome:
    """Errors relative to one device, as max abs difference / max abs reference; times in ms."""

    forward_error: float
    gradient_error: float
    bytes_sent: int
    bytes_needed: int
    imbalance: float
    ring_ms: float
    alone_ms: float

    def is_good(self, dtype: torch.dtype) -> bool:
        errors = max(self.forward_error, self.gradient_error)
        return errors <= BUDGET[dtype] and self.bytes_sent <= BYTES_BUDGET * self.bytes_needed


def compare(case: Case, communicator: Communicator) -> Outcome:
    """One case on all ranks; every rank gets the same outcome, but for its own times."""
    rank, world_size, device = communicator.rank, communicator.world_size, communicator.device
    layout = case.layout(world_size, device)
    whole = _inputs(case, layout.q_len, device)
    plan = RingPlan(
        layout,
        partition_for([layout], world_size, strategy=case.partition),
        queries_per_kv=case.heads // case.kv_heads,
    )
    exact = _attend(whole, lambda q, k, v: block_sparse_attention(q, k, v, layout))
    shards = [plan.partition.shard(x, rank) for x in whole]
    communicator.barrier()
    communicator.ledger.clear()
    got = _attend(shards, lambda q, k, v: ring_attention(q, k, v, plan, communicator))
    sent = torch.tensor([float(communicator.ledger.sent["kv"])], dtype=torch.float64, device=device)
    errors = torch.stack(
        [_error(part, plan.partition.shard(x, rank)) for part, x in zip(got[0], exact[0], strict=True)]
    )
    errors = torch.stack(communicator.all_gather("check", errors)).amax(0)
    size = (case.kv_heads, whole[1].shape[3], whole[1].element_size())
    return Outcome(
        float(errors[0]),
        float(errors[1:].max()),
        int(communicator.all_reduce("check", sent)) // K_AND_V_WENT_ROUND,
        plan.bytes_needed(*size),
        plan.imbalance,
        got[1],
        exact[1],
    )


def _inputs(case: Case, tokens: int, device: torch.device) -> list[Tensor]:
    """q, k, v and the gradient of out, (1, heads, tokens, 32), the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [torch.randn(1, n, tokens, 32, generator=generator).to(device, case.dtype) for n in heads]


def _attend(inputs: list[Tensor], attention: Callable[..., Any]) -> tuple[list[Tensor], float]:
    """out and the gradients of q, k and v, and the milliseconds of the last of ``RUNS`` runs."""
    *given, grad_out = inputs
    for _ in range(RUNS):
        leaves = [x.clone().requires_grad_() for x in given]
        _finish(grad_out.device)
        begin = time.perf_counter()
        out = attention(*leaves)
        out.backward(grad_out)
        _finish(grad_out.device)
        ms = 1e3 * (time.perf_counter() - begin)
    return [out.detach(), *(leaf.grad for leaf in leaves)], ms


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _error(got: Tensor, wanted: Tensor) -> Tensor:
    difference = (got.double() - wanted.double()).abs()
    return difference.max() / wanted.double().abs().max().clamp(min=1e-30) if got.numel() else difference.new_zeros(())


def _join() -> Communicator:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
    return Communicator(dist.group.WORLD, device=device)


def main() -> int:
    if "RANK" not in os.environ:
        print(
            "run me as: python -m torch.distributed.run --nproc_per_node=2 -m raybsa.ring.check (got no RANK in the "
            "environment)",
            file=sys.stderr,
        )
        return 2
    communicator = _join()
    speaks = communicator.rank == 0
    if speaks:
        print(f"{communicator.world_size} ranks on {communicator.device.type}, torch {torch.__version__}")
        print(
            f"{'case':44s}{'dtype':>10s}{'err fwd':>10s}{'err grad':>10s}{'sent KiB':>10s}{'needed':>8s}"
            f"{'max/mean':>10s}{'ring ms':>9s}{'alone ms':>9s}"
        )
    good = True
    for case in CASES:
        outcome = compare(case, communicator)
        good &= outcome.is_good(case.dtype)
        if speaks:
            print(_line(case, outcome), flush=True)
    communicator.barrier()
    communicator.close()
    dist.destroy_process_group()
    if speaks:
        print("every case equals one device" if good else "NOT every case equals one device")
    return 0 if good else 1


def _line(case: Case, o: Outcome) -> str:
    needed = f"{o.bytes_sent / o.bytes_needed:.3f}x" if o.bytes_needed else "-"
    return (
        f"{case!s:44s}{str(case.dtype).removeprefix('torch.'):>10s}{o.forward_error:10.1e}{o.gradient_error:10.1e}"
        f"{o.bytes_sent / 1024:10.0f}{needed:>8s}{o.imbalance:10.3f}{o.ring_ms:9.1f}{o.alone_ms:9.1f}"
        f"{'' if o.is_good(case.dtype) else '  OFF'}"
    )


if __name__ == "__main__":
    sys.exit(main())
