"""Launching a kernel: through Triton's dispatch the first time, through what it compiled ever after.

Triton's dispatch looks at every argument of every call; for our many arguments that takes longer than a small kernel
runs. What it specialises on is known here beforehand, so that one dictionary look-up finds the compiled kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from raybsa.kernels.triton_setup import interpreting

_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: tuple[Any, ...],
    sizes: tuple[int, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    warps: int = 4,
    stages: int = 2,
) -> None:
    """Runs ``kernel(*tensors, *sizes, *numbers, *constants)``.

    Args:
        grid: programs along x and y.
        tensors: tensors, of which the first says the device to run on, descriptors, and None for what is not wanted.
        sizes: integers that Triton may specialise on (strides).
        numbers: those named in the kernel's ``do_not_specialize``, below 2**31, and floats.
        constants: the kernel's ``tl.constexpr`` arguments, in its order.
    """
    kinds = tuple([None if t is None else _kind(t) for t in tensors])
    key = (kernel.__name__, tensors[0].device, kinds, sizes, constants, warps, stages)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[(*grid, 1)](*tensors, *sizes, *numbers, *constants)
        return
    names = kernel.arg_names[-len(constants) :]
    made = kernel[grid](
        *tensors,
        *sizes,
        *numbers,
        **dict(zip(names, constants, strict=True)),
        num_warps=warps,
        num_stages=stages,
    )
    if not interpreting():
        _COMPILED[key] = made


def _kind(tensor: Any) -> tuple[Any, ...]:
    """What Triton compiles for: a tensor's type and alignment, a descriptor's type and tile."""
    if isinstance(tensor, Tensor):
        return tensor.dtype, tensor.data_ptr() % 16
    return tensor.base.dtype, *tensor.block_shape
