"""Our kernels beside other libraries' on one layout: each checked first, then all timed in turn, in one process.

Ours are called as a user calls them; the others through their adapter's ``run`` alone, without our checks, so that
what they cost is theirs.
"""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from raybsa import patterns
from raybsa.kernels.api import BACKENDS, block_sparse_attention, choose_backend
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.peers import dense
from raybsa.kernels.peers.guards import installed
from raybsa.layout import BlockLayout
from raybsa.results.record import Measurement
from raybsa.spec import DENSE, AttentionSpec, TrialSpec
from raybsa.tasks.sampled import (
    Parts,
    forward_error,
    gradient_error,
    parts_error,
    picks_of,
    sampled_attention,
    sampled_gradient,
)
from raybsa.tasks.speed import synthetic_qkv
from raybsa.timing import DeviceLock, Quantiles, device_name, host_ms, measure_in_turn, peak_bytes, wall_ms

TASK = "peers"
OWN = ("triton", "cpp", "blocked", "auto")  # called through block_sparse_attention
PACKAGES = {"triton": "triton", "flex": "torch", "fa4": "flash-attn-4", "cudnn": "nvidia-cudnn-frontend"}
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 2e-2, 4e-2  # relative errors beyond these are wrong results, not rounding
HOST_BELOW_MS = 5.0  # where a call takes longer nobody waits for Python


class Refused(str):
    """Why a library does not serve the cell."""


Answer = Measurement | Refused | str  # a plain string says what went wrong


class GpuLost(RuntimeError):
    """A kernel left the GPU unusable for this process; what was measured before is kept."""


@dataclass(frozen=True)
class Times:
    """Medians and the rest of one implementation; None where it has no backward."""

    forward: Quantiles
    forward_backward: Quantiles | None
    peak_bytes: int


@dataclass(frozen=True, eq=False)
class Inputs:
    """q (B, H, S, D), k and v (B, Hkv, S, D), leaves of autograd, and an upstream gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


@dataclass(frozen=True, eq=False)
class Side:
    """One implementation on one layout."""

    backend: str
    attend: Callable[[AttentionCall], Tensor]
    call: AttentionCall
    trains: bool

    @cached_property
    def inference(self) -> AttentionCall:
        """The call without autograd's leaves, by which some libraries tell whether to prepare a backward."""
        q, k, v = (x.detach() for x in (self.call.q, self.call.k, self.call.v))
        return replace(self.call, q=q, k=k, v=v)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.attend(self.inference)

    def forward_backward(self, grad_out: Tensor) -> tuple[Tensor, ...]:
        leaves = (self.call.q, self.call.k, self.call.v)
        return torch.autograd.grad(self.attend(self.call), leaves, grad_out)


def peer_inputs(spec: TrialSpec, device: torch.device) -> Inputs:
    """Inputs of every cell of these sizes."""
    q, k, v = (x.requires_grad_() for x in synthetic_qkv(spec, device))
    generator = torch.Generator(device).manual_seed(spec.seed)
    grad_out = torch.randn(q.shape, generator=generator, device=device, dtype=q.dtype)
    return Inputs(q, k, v, grad_out)


def peer_layout(spec: TrialSpec, device: torch.device | str) -> BlockLayout:
    """A layout a head, also where the heads' layouts are equal: what all libraries take."""
    attention = spec.layer(0)
    assert attention.pattern is not None
    layout = patterns.build(attention.pattern).layout(
        spec.seq_len,
        num_heads=spec.num_heads,
        q_block_size=attention.block_size,
        causal=spec.causal,
        density=attention.density,
        device=device,
    )
    return layout if layout.num_groups == spec.num_heads else layout.repeat_heads(spec.num_heads)


def measure_dense(
    spec: TrialSpec, name: str, inputs: Inputs, *, repeats: int = 20, budget_s: float = 0.3
) -> Measurement:
    """Dense attention of these sizes by one of torch's kernels. Raises RuntimeError where torch cannot use it."""
    device, leaves = inputs.q.device, inputs.leaves

    def forward() -> Tensor:
        with torch.no_grad():
            return dense.attend(name, *leaves, causal=spec.causal)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(dense.attend(name, *leaves, causal=spec.causal), leaves, inputs.grad_out)

    timing: dict[str, Any] = {"repeats": repeats, "budget_s": budget_s, "warmup": 1}
    with DeviceLock(device).exclusive():
        (first,), (second,) = (measure_in_turn([call], device, **timing) for call in (forward, both))
    return replace(
        _of_times(Times(first, second, peak_bytes(both, device)), device), density=1.0, library=_library("flex")
    )


def dense_spec(spec: TrialSpec, name: str) -> TrialSpec:
    """The question that ``measure_dense`` answers."""
    return replace(spec, attention=(AttentionSpec(DENSE, backend=name),))


def of_backend(spec: TrialSpec, backend: str) -> TrialSpec:
    """The same question to another implementation."""
    return replace(spec, attention=(replace(spec.layer(0), backend=backend),))


def measure_cell(
    spec: TrialSpec,
    backends: Sequence[str],
    inputs: Inputs,
    ideal: Measurement | None = None,
    *,
    repeats: int = 20,
    budget_s: float = 0.3,
) -> Iterator[tuple[TrialSpec, Answer]]:
    """What each implementation does on the spec's layout: those that refuse or fail as they are tried, the rest timed.

    Args:
        backends: names of ``BACKENDS``, or ``"auto"``, which is left out where it takes our own kernels, timed anyway.
        ideal: dense attention of the same sizes, for the ``dense_*`` columns.
        repeats, budget_s: as in ``measure_in_turn``.

    Raises:
        GpuLost: after a failure from which CUDA does not recover.
    """
    device = inputs.q.device
    layout = peer_layout(spec, device)
    call = _call(inputs.leaves, layout)
    picks = picks_of(call)
    sparse_gradient = sampled_gradient(call, picks)
    exact = sampled_attention(call, picks, sparse_gradient, torch.float32)
    rounding = parts_error(sampled_attention(call, picks, sparse_gradient, call.q.dtype), exact)
    checked: list[tuple[Side, Measurement]] = []
    for backend in backends:
        side = _side(backend, call)
        if backend == "auto" and isinstance(side, Side) and set(_chosen(side)) <= set(OWN):
            continue
        found = side if isinstance(side, Refused) else _checked(side, exact, sparse_gradient)
        if isinstance(side, Side) and isinstance(found, Measurement):
            checked.append((side, replace(found, density=layout.density)))
        else:
            yield of_backend(spec, backend), found
            _require_gpu(device)
    del exact, sparse_gradient
    yield from _timed(spec, checked, rounding, inputs.grad_out, ideal, repeats, budget_s)


def _timed(
    spec: TrialSpec,
    checked: list[tuple[Side, Measurement]],
    rounding: tuple[float, float],
    grad_out: Tensor,
    ideal: Measurement | None,
    repeats: int,
    budget_s: float,
) -> Iterator[tuple[TrialSpec, Answer]]:
    if not checked:
        return
    sides = [side for side, _ in checked]
    device = grad_out.device
    both = {side.backend: partial(side.forward_backward, grad_out) for side in sides if side.trains}
    with DeviceLock(device).exclusive():
        timing: dict[str, Any] = {"repeats": repeats, "budget_s": budget_s, "warmup": 0}
        forward = measure_in_turn([side.forward for side in sides], device, **timing)
        trained = dict(zip(both, measure_in_turn(list(both.values()), device, **timing) if both else [], strict=True))
        for (side, found), first in zip(checked, forward, strict=True):
            second = trained.get(side.backend)
            whole = both.get(side.backend, side.forward)
            times = Times(first, second, peak_bytes(whole, device))
            measured = replace(
                _of_times(times, device),
                density=found.density,
                error_forward=found.error_forward,
                error_gradient=found.error_gradient,
                layout_bytes=found.layout_bytes,
                reference_error_forward=rounding[0],
                reference_error_gradient=rounding[1],
                forward_host_ms=_host(side.forward, first, device),
                forward_backward_host_ms=_host(whole, second, device),
                layout_ms=_layout_ms(side, grad_out, (second or first).p50),
                dense_forward_ms_p50=ideal.forward_ms_p50 if ideal else None,
                dense_forward_backward_ms_p50=ideal.forward_backward_ms_p50 if ideal else None,
                dense_peak_bytes=ideal.peak_bytes if ideal else None,
                library=" / ".join(_chosen(side)) if side.backend == "auto" else _library(side.backend),
            )
            yield of_backend(spec, side.backend), measured


def _side(backend: str, call: AttentionCall) -> Side | Refused:
    """The implementation, forward alone where it has no backward here; why not where it has neither."""
    attend = _attend_own if backend in OWN else _attend_peer
    if backend == "auto":
        return Side(backend, partial(attend, backend), call, True)
    reason = BACKENDS[backend].why_not(call)
    if reason is None:
        return Side(backend, partial(attend, backend), call, True)
    alone = Side(backend, partial(attend, backend), call, False)
    return alone if BACKENDS[backend].why_not(alone.inference) is None else Refused(reason)


def _chosen(side: Side) -> tuple[str, str]:
    """What ``auto`` takes for the forward alone and for forward and backward."""
    return choose_backend(side.inference), choose_backend(side.call)


def _attend_own(backend: str, call: AttentionCall) -> Tensor:
    out = block_sparse_attention(call.q, call.k, call.v, call.layout, backend=backend)
    assert isinstance(out, Tensor)
    return out


def _attend_peer(backend: str, call: AttentionCall) -> Tensor:
    return BACKENDS[backend].run(call)[0]


def _checked(side: Side, exact: Parts, sparse_gradient: Tensor) -> Measurement | str:
    """Errors and what stays with the layout, or what is wrong."""
    device = side.call.q.device
    held = _held_bytes(device)
    try:
        forward = forward_error(side.forward(), exact, side.call)
        gradient = gradient_error(side.forward_backward(sparse_gradient), exact) if side.trains else None
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"
    except Exception as error:  # whatever another library raises is its row's, not the suite's
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    if not forward <= FORWARD_TOLERANCE or not (gradient is None or gradient <= GRADIENT_TOLERANCE):
        return f"wrong: relative error {forward:.1e} forward, {gradient} in the gradients"
    kept = None if held is None else (_held_bytes(device) or 0) - held
    return Measurement(error_forward=forward, error_gradient=gradient, layout_bytes=kept)


def _call(leaves: tuple[Tensor, Tensor, Tensor], layout: BlockLayout) -> AttentionCall:
    scale = 1.0 / math.sqrt(leaves[0].shape[-1])
    return AttentionCall(*leaves, layout, scale, None, None, None, 0.0, None, False, False)


def _layout_ms(side: Side, grad_out: Tensor, known_ms: float) -> float:
    """Milliseconds that a call takes longer with a layout that is seen for the first time; nothing is compiled."""
    new = replace(side, call=replace(side.call, layout=copy.copy(side.call.layout)))
    call = partial(new.forward_backward, grad_out) if side.trains else new.forward
    return wall_ms(call, grad_out.device) - known_ms


def _host(call: Callable[[], object], times: Quantiles | None, device: torch.device) -> float | None:
    return host_ms(call, device) if times is not None and times.p50 < HOST_BELOW_MS else None


def _held_bytes(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def _require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise GpuLost(f"the GPU does not answer after the last failure ({error}); start again to go on") from error


def _of_times(times: Times, device: torch.device) -> Measurement:
    both = times.forward_backward
    on_cuda = device.type == "cuda"
    return Measurement(
        forward_ms_p20=times.forward.p20,
        forward_ms_p50=times.forward.p50,
        forward_ms_p80=times.forward.p80,
        forward_backward_ms_p20=both.p20 if both else None,
        forward_backward_ms_p50=both.p50 if both else None,
        forward_backward_ms_p80=both.p80 if both else None,
        peak_bytes=times.peak_bytes,
        device=device.type,
        device_name=device_name(device),
        capability="sm_{}{}".format(*torch.cuda.get_device_capability(device)) if on_cuda else "",
        torch_version=torch.__version__,
        python_version=platform.python_version(),
    )


def _library(backend: str) -> str:
    package = PACKAGES.get(backend, "torch")
    return f"{package} {installed(package)}"
