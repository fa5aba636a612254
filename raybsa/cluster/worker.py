"""Worker: one device, one trial at a time. A plain class; the Coordinator makes it a Ray actor."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from raybsa.results.record import Measurement
from raybsa.spec import TrialSpec
from raybsa.tasks.attention import layer_density
from raybsa.tasks.catalog import Judgement, prepare_training
from raybsa.tasks.exactness import relative_errors
from raybsa.tasks.params import known_params
from raybsa.tasks.preview import save_weights
from raybsa.tasks.speed import Stacks, measure_beside_dense, synthetic_stacks
from raybsa.tasks.training import Quality, Training
from raybsa.timing import DeviceLock, Quantiles, device_name


@dataclass
class _UnderWay:
    """A trial that may be asked for more steps. ``seconds``: of this worker so far."""

    spec: TrialSpec
    training: Judgement | None
    measured: Measurement
    seconds: float


class Worker:
    """Answers TrialSpecs on its device.

    Args:
        device: ``"cpu"`` or ``"cuda"`` (the first device that this process sees).
        num_threads: CPU threads that PyTorch may use; None leaves its choice.
        repeats: timed calls, fewer where they would take over ``budget_s`` seconds (see ``timing.measure_in_turn``).
        keep: digest of a question -> the file that its weights are written to once it is trained.
    """

    def __init__(
        self,
        device: str = "cpu",
        *,
        num_threads: int | None = None,
        repeats: int = 20,
        budget_s: float = 2.0,
        keep: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("a worker was asked for a CUDA device, but this process sees none")
        self.device = torch.device(device)
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._repeats, self._budget_s, self._keep = repeats, budget_s, keep
        self._lock = DeviceLock(self.device)
        self._last: _UnderWay | None = None

    def describe(self) -> str:
        """The device's name. Also the sign that the worker is up."""
        return device_name(self.device)

    def run(self, spec: TrialSpec, until: int | None = None) -> Measurement:
        """Times attention and its dense baseline, then trains and evaluates where the task asks for it.

        Time is measured first: what cannot be timed costs no training, and a caller may look at the times before it
        asks for more. A question that was not asked to its end stays at hand: asked for more steps, it goes on.

        Args:
            until: training steps to be done on return; 0 times only, None is all of them.

        Raises:
            ValueError, TypeError, NotImplementedError: the spec asks for what does not exist or fit.
        """
        start = time.perf_counter()
        if self._last is None or self._last.spec != spec:
            self._last = None  # the old model goes before the new one comes
            training = prepare_training(spec, self.device, self._lock)
            timed = self._timed(spec, training)
            self._last = _UnderWay(spec, training, timed, 0.0)
        trial = self._last
        if until is None:
            self._last = None
        measured = trial.measured
        if trial.training is not None and until != 0:
            measured = _with_quality(measured, trial.training.advance(until))
            if spec.digest in self._keep and until is None and isinstance(trial.training, Training):
                save_weights(trial.training, self._keep[spec.digest])
        trial.seconds += time.perf_counter() - start
        return replace(measured, worker_seconds=trial.seconds)

    def _timed(self, spec: TrialSpec, training: Judgement | None) -> Measurement:
        """What is known before any training; of a preview that is its density alone."""
        own = None if training is None else training.attention
        density = self._density(spec) if own is None else own.density
        if spec.weights is not None:
            return Measurement(density=density, device=self.device.type, device_name=device_name(self.device))
        stacks = partial(synthetic_stacks, spec, self.device) if own is None else own.stacks
        return self._time(density, stacks, self._errors(spec) if training is None else (None, None))

    def _density(self, spec: TrialSpec) -> float:
        with self._lock.shared():
            return sum(layer_density(spec, index) for index in range(spec.num_layers)) / spec.num_layers

    def _time(
        self, density: float, stacks: Callable[[], Stacks], errors: tuple[float | None, float | None]
    ) -> Measurement:
        own, dense = measure_beside_dense(
            stacks, self.device, self._lock, repeats=self._repeats, budget_s=self._budget_s
        )
        return Measurement(
            density=density,
            **_times("forward", own.forward),
            **_times("forward_backward", own.forward_backward),
            dense_forward_ms_p50=dense.forward.p50,
            dense_forward_backward_ms_p50=None if dense.forward_backward is None else dense.forward_backward.p50,
            peak_bytes=own.peak_bytes,
            dense_peak_bytes=dense.peak_bytes,
            error_forward=errors[0],
            error_gradient=errors[1],
            device=self.device.type,
            device_name=device_name(self.device),
            num_threads=torch.get_num_threads(),
            torch_version=torch.__version__,
            python_version=platform.python_version(),
        )

    def _errors(self, spec: TrialSpec) -> tuple[float | None, float | None]:
        """Task "speed" with the parameter ``error_len`` also measures how exact the attention is at that length."""
        length = known_params(spec, {"error_len": None})["error_len"]
        if length is None or spec.layer(0).pattern is None:
            return None, None
        with self._lock.shared():
            return relative_errors(spec, length, self.device)


def _times(name: str, found: Quantiles | None) -> dict[str, Any]:
    quantiles = (None, None, None) if found is None else (found.p20, found.p50, found.p80)
    return {f"{name}_ms_{key}": value for key, value in zip(("p20", "p50", "p80"), quantiles, strict=True)}


def _with_quality(measured: Measurement, quality: Quality) -> Measurement:
    return replace(
        measured,
        quality_name=quality.name,
        quality_goal=quality.goal,
        quality=quality.value,
        train_seconds=quality.train_seconds,
        trained_steps=quality.steps,
        curves=quality.curves,
    )
