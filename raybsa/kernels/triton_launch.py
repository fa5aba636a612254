"""Launching a kernel: through Triton's dispatch the first time, straight through CUDA's driver ever after.

Triton's dispatch looks at every argument of every call; for our many arguments that takes longer than a small kernel
runs. What it specialises on is known here beforehand, so that one dictionary look-up finds what it compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import Tensor

from raybsa.kernels.triton_driver import Direct
from raybsa.kernels.triton_setup import current_stream, interpreting

Tensors = tuple[Tensor | None, ...]
Boxes = tuple[tuple[int, tuple[int, ...]], ...]
_LAUNCHERS: dict[tuple[Any, ...], Launcher] = {}


def launcher(
    kernel: Any,
    tensors: Tensors,
    sizes: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int = 4,
    stages: int = 2,
    boxes: Boxes = (),
    describe: Callable[[Tensor, tuple[int, ...]], Any] | None = None,
    registers: int | None = None,
) -> Launcher:
    """The launcher of ``kernel(*tensors, *sizes, *numbers, *constants)`` for tensors of these types and alignments.

    Args:
        tensors: None for what is not wanted.
        sizes: integers that Triton may specialise on (strides).
        constants: the kernel's ``tl.constexpr`` arguments, in its order.
        boxes: which of the tensors go in as descriptors, and the tile that each loads.
        describe: makes such a descriptor; None makes Triton's.
        registers: the most that a thread may have; None leaves it to Triton.
    """
    kinds = tuple([None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors])
    shapes = tuple([(tensors[at].shape, tensors[at].stride(), box) for at, box in boxes])  # type: ignore[union-attr]
    device = next(t.device for t in tensors if t is not None)
    key = (kernel.__name__, device, kinds, shapes, sizes, constants, warps, stages, registers)
    found = _LAUNCHERS.get(key)
    if found is None:
        found = _LAUNCHERS[key] = Launcher(
            kernel, device.index, sizes, constants, warps, stages, boxes, describe or _descriptor, registers
        )
    return found


class Launcher:
    """A kernel with its sizes and constants."""

    def __init__(
        self,
        kernel: Any,
        device: int | None,
        sizes: tuple[int, ...],
        constants: tuple[Any, ...],
        warps: int,
        stages: int,
        boxes: Boxes,
        describe: Callable[[Tensor, tuple[int, ...]], Any],
        registers: int | None,
    ) -> None:
        names = kernel.arg_names[-len(constants) :]
        self._kernel, self._sizes, self._boxes, self._device = kernel, sizes, boxes, device
        self._describe = describe
        self._options = dict(zip(names, constants, strict=True)) | {"num_warps": warps, "num_stages": stages}
        if registers is not None:
            self._options["maxnreg"] = registers
        self._direct: Direct | None = None
        self._may_be_direct = not interpreting()

    def __call__(self, grid: tuple[int, int], tensors: Tensors, numbers: tuple[int | float, ...]) -> None:
        """Runs ``grid`` programs along x and y.

        Args:
            tensors: as ``launcher`` was given them, at any address of the same alignment.
            numbers: those named in the kernel's ``do_not_specialize``, below 2**31, and floats.
        """
        if self._direct is not None:
            self._direct(grid, tensors, numbers, current_stream(self._device))
        else:
            self._dispatch(grid, tensors, numbers)

    def _dispatch(self, grid: tuple[int, int], tensors: Tensors, numbers: tuple[int | float, ...]) -> None:
        given: list[Any] = list(tensors)
        for place, box in self._boxes:
            given[place] = self._describe(given[place], box)
        made = self._kernel[grid](*given, *self._sizes, *numbers, **self._options)
        if self._may_be_direct and made is not None:
            self._may_be_direct = False
            with suppress(NotImplementedError):
                self._direct = Direct(made, tensors, self._sizes)


def _descriptor(tensor: Tensor, box: tuple[int, ...]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box))
