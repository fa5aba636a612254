"""Whether Triton can be used here. Triton itself is imported where its kernels are, and only when one is wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None


def why_not_here(device: torch.device) -> str | None:
    """Why Triton cannot run on ``device``; None where it can (a GPU, or a CPU under Triton's interpreter)."""
    if not INSTALLED:
        return "Triton is not installed (pip install 'raybsa[gpu]')"
    if device.type == "cpu" and not interpreting():
        return "Triton runs on GPUs; on a CPU only under its interpreter (TRITON_INTERPRET=1 before triton is imported)"
    if device.type not in ("cpu", "cuda"):
        return f"the Triton kernels run on cuda, not on {device.type}"
    return None


def has_kernels(x: Tensor) -> bool:
    """Whether small kernels of ours, beside those of the attention, serve a tensor: 16 or 32 bits, on a GPU."""
    return x.is_cuda and INSTALLED and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


def launching_at(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: where the tensor lies, for the time of a launch."""
    if not tensor.is_cuda:
        repair_interpreter()
        return nullcontext()
    return nullcontext() if devices() == 1 else torch.cuda.device(tensor.device)


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for: kernels then run as numpy on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def repair_interpreter() -> None:
    """Lets the interpreter of Triton 3.6 run loops under numpy 2.4.

    There a loop's bound is a numpy array of one element, which numpy no longer turns into an int (Triton 3.7 squeezes
    it itself).
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; an H100's number under the interpreter, so that plans are alike."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take; an H100's under the interpreter."""
    if device.type != "cuda":
        return 232_448
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    return driver.active.utils.get_device_properties(index)["max_shared_mem"]


def current_stream(index: int | None) -> int:
    """The handle of torch's current stream on a GPU, without the Python object around it."""
    return _raw_stream()(index)


@cache
def _raw_stream() -> Callable[[int | None], int]:
    from triton.runtime import driver

    return driver.active.get_current_stream


@cache
def devices() -> int:
    """How many GPUs this process sees."""
    return torch.cuda.device_count()


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device multiplies in groups of warps (``wgmma``), as an H100, H200 or GH200 does."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
