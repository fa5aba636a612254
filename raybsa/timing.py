"""How long a call takes and how much memory it needs, measured while no neighbour computes on the same device.

Times are quantiles of single calls after a warm-up, never a mean. On CUDA they come from events with the L2 cache
flushed before each call (as ``triton.testing.do_bench`` does), on the CPU from ``time.perf_counter``. Peak memory comes
from a separate, untimed call: on CUDA from the allocator's own high-water mark, on the CPU from every allocation and
release that ``torch.profiler`` sees in PyTorch's CPU allocator, which includes what operators use inside.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raybsa.locks import locked
from raybsa.scratch import scratch

_FLUSH_BYTES = 256 << 20
_MIN_REPEATS = 5


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds of one call: the 20th, 50th and 80th percentile of ``repeats`` calls."""

    p20: float
    p50: float
    p80: float
    repeats: int


def measure_in_turn(
    calls: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    warmup: int = 1,
    repeats: int = 20,
    budget_s: float = 2.0,
) -> list[Quantiles]:
    """Times several calls A B A B …, so that a machine whose speed drifts is fair to all of them.

    Hold ``DeviceLock(device).exclusive()`` around it where neighbours may compute.

    Args:
        calls: what to time; they compute on ``device``.
        warmup: untimed calls of each first (compilation, caches), then one more that estimates the duration.
        repeats: timed calls of each; fewer (but at least 5) where the estimates say that all of them together would
            take over ``budget_s`` a call.
    """
    timed = _timed_cuda if torch.device(device).type == "cuda" else _timed_cpu
    for call in calls:
        for _ in range(warmup):
            call()
    round_ms = sum(timed([call], 1)[0][0] for call in calls)
    affordable = int(budget_s * 1e3 * len(calls) / max(round_ms, 1e-6))
    times = timed(calls, min(repeats, max(_MIN_REPEATS, affordable)))
    return [quantiles_of(of_call) for of_call in times]


def host_ms(call: Callable[[], object], device: torch.device | str, repeats: int = 10) -> float:
    """Median milliseconds until ``call`` returns to Python: on CUDA what launching costs, not what is launched."""
    times = []
    for _ in range(repeats):
        _settle(torch.device(device))
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return quantiles_of(times).p50


def wall_ms(call: Callable[[], object], device: torch.device | str) -> float:
    """Milliseconds of one call from its start to the end of all that it launched."""
    _settle(torch.device(device))
    start = time.perf_counter()
    call()
    _settle(torch.device(device))
    return (time.perf_counter() - start) * 1e3


def forward_call(attend: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The forward alone, as inference runs it: without autograd."""

    def call() -> Any:
        with torch.no_grad():
            return attend(*inputs)

    return call


def forward_backward_call(
    attend: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
) -> Callable[[], object]:
    """Forward, then the gradients of all ``inputs`` for gradients of ones. Nothing accumulates between calls."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)

    def call() -> object:
        out = attend(*leaves)
        outs = (out,) if isinstance(out, Tensor) else out
        return torch.autograd.grad(outs, leaves, tuple(torch.ones_like(one) for one in outs))

    return call


def quantiles_of(times_ms: Sequence[float]) -> Quantiles:
    """The quantiles of single calls' milliseconds."""
    times = torch.tensor(times_ms, dtype=torch.float64)
    p20, p50, p80 = torch.quantile(times, times.new_tensor([0.2, 0.5, 0.8])).tolist()
    return Quantiles(p20, p50, p80, len(times))


def peak_bytes(call: Callable[[], object], device: torch.device | str) -> int:
    """The most bytes of tensors that ``call`` holds at once, its result included, beyond what was there before."""
    device = torch.device(device)
    if device.type != "cuda":
        return _peak_bytes_cpu(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def device_name(device: torch.device) -> str:
    """The model of the GPU or processor, as its vendor calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class DeviceLock:
    """One lock a device and host, between processes: computing shares it, timing has it alone.

    Two ``flock`` files: whoever wants in first passes the *gate*. A waiting timer keeps the gate, so those who compute
    in short slices (``with lock.shared()`` around a few steps) let it in after their slice and cannot starve it. The
    kernel drops both locks when their holder dies; who waits for long is told who holds them (locks.py).

    Args:
        device: ``"cpu"`` or a CUDA device, which is known by its UUID, whatever its number is in this process.
        folder: where the lock files lie; by default the system's temporary folder, so that all of a host meet.
    """

    def __init__(self, device: torch.device | str, folder: str | None = None) -> None:
        self._path = os.path.join(folder or tempfile.gettempdir(), _lock_name(_identity(torch.device(device))))

    @contextmanager
    def shared(self) -> Iterator[None]:
        """While this process computes. Others may compute too, none may be timing."""
        with locked(f"{self._path}.lock", fcntl.LOCK_SH, gate=f"{self._path}.gate", keep_gate=False):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """While this process times. Waits for the slices under way, then nobody else holds the device."""
        with locked(f"{self._path}.lock", fcntl.LOCK_EX, gate=f"{self._path}.gate", keep_gate=True):
            yield


def lock_files() -> list[str]:
    """The locks of this host's devices, gates first."""
    found = Path(tempfile.gettempdir()).glob(f"{_lock_name('*')}.*")
    return sorted(str(path) for path in found if path.suffix in (".gate", ".lock"))


# ---- for ourselves -------------------------------------------------------------------------------------------------


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed_cpu(calls: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Milliseconds of each call, in rounds."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, of_call in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            of_call.append((time.perf_counter() - start) * 1e3)
    return times


def _timed_cuda(calls: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    marks: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, of_call in zip(calls, marks, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            of_call.append((start, end))
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) for start, end in of_call] for of_call in marks]


def _peak_bytes_cpu(call: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler else prints two lines at every use
    with scratch("memory") as folder:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:  # torch.profiler's imports inductor
            result = call()
        del result
        path = os.path.join(folder, "trace.json")
        profile.export_chrome_trace(path)
        with open(path, encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _lock_name(identity: str) -> str:
    return re.sub(r"[^A-Za-z0-9.*-]", "_", f"raybsa-{socket.gethostname()}-{identity}")


def _identity(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type
