"""Launching what Triton compiled through CUDA's driver, with the bytes of its arguments laid out beforehand.

Triton's own launcher parses every argument of every call and makes each tensor map anew, which takes the host longer
than a small kernel runs. Here a call writes the pointers that changed, and launches. The order of the parameters is
Triton's (those that are not constants, then two pointers of scratch memory); their sizes are checked against what the
driver says of the compiled function.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_SIZES = {"i32": 4, "i64": 8, "fp32": 4}
_TYPES: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_ELEMENTS = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
_MAP_BYTES, _MAP_ALIGNMENT, _PROMOTE_128_BYTES, _MAPS_KEPT = 128, 64, 2, 64
_NO_CONTEXT, _POINTER = 201, 8


class Direct:
    """A compiled kernel whose sizes and constants do not change from call to call."""

    def __init__(self, compiled: Any, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
        """Raises NotImplementedError where this driver or this Triton does something else than is known here."""
        metadata = compiled.metadata
        maps = iter(getattr(metadata, "tensordesc_meta", None) or ())
        if getattr(metadata, "global_scratch_size", 0) or getattr(metadata, "num_ctas", 1) != 1:
            raise NotImplementedError("a kernel with scratch memory or clusters")
        self._function = ctypes.c_void_p(compiled.function)
        self._block = 32 * metadata.num_warps
        self._shared = metadata.shared
        self._bytes: list[int] = []
        self._areas: list[Any] = []
        self._pointers: list[tuple[int, Any]] = []
        self._numbers: list[tuple[int, Any]] = []
        self._maps: list[tuple[int, _TensorMap]] = []
        self._written: object = None
        self._lock = threading.Lock()
        first_number = len(tensors) + len(sizes)
        for place, kind in enumerate(compiled.src.signature.values()):
            if kind == "constexpr":
                continue
            tensor = tensors[place] if place < len(tensors) else None
            if kind.startswith("tensordesc") and tensor is not None:
                self._add_map(place, tensor, next(maps, None))
            elif kind.startswith("*"):
                self._pointers.append((place, self._add(ctypes.c_uint64)))
            elif kind in _SIZES and place < first_number:
                self._add(_TYPES[kind], sizes[place - len(tensors)])
            elif kind in _SIZES:
                self._numbers.append((place - first_number, self._add(_TYPES[kind])))
            else:
                raise NotImplementedError(f"an argument of type {kind}")
        for _ in range(2):
            self._add(ctypes.c_uint64)
        self._check_sizes()
        addresses = [ctypes.addressof(area) for area in self._areas]
        self._parameters = (ctypes.c_void_p * len(addresses))(*addresses)

    def __call__(
        self, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: tuple[int | float, ...], stream: int
    ) -> None:
        """Launches on the current device; ``numbers`` are only written where they are another object than last time."""
        with self._lock:
            for place, area in self._pointers:
                area.value = tensors[place].data_ptr()  # type: ignore[union-attr]
            for place, tensor_map in self._maps:
                tensor_map.point_to(tensors[place].data_ptr())  # type: ignore[union-attr]
            if numbers is not self._written:
                for place, area in self._numbers:
                    area.value = numbers[place]
                self._written = numbers
            result = self._launch(grid, stream)
            if result == _NO_CONTEXT:  # the first CUDA call of this thread
                torch.cuda.mem_get_info()
                result = self._launch(grid, stream)
        if result:
            raise RuntimeError(f"CUDA could not launch a kernel: error {result}")

    def _launch(self, grid: tuple[int, int], stream: int) -> int:
        return _driver().cuLaunchKernel(
            self._function, grid[0], grid[1], 1, self._block, 1, 1, self._shared, stream, self._parameters, None
        )

    def _add(self, kind: Any, *value: int | float) -> Any:
        area = kind(*value)
        self._areas.append(area)
        self._bytes.append(ctypes.sizeof(kind))
        return area

    def _add_map(self, place: int, tensor: Tensor, meta: dict[str, Any] | None) -> None:
        if meta is None or meta.get("fp4_padded") or tensor.dtype not in _ELEMENTS:
            raise NotImplementedError("a tensor descriptor that is no tensor map")
        self._maps.append((place, _TensorMap(tensor, meta, self._add(ctypes.c_char * _MAP_BYTES))))
        for length in tensor.shape:
            self._add(ctypes.c_int32, length)
        for step in tensor.stride():
            self._add(ctypes.c_int64, step)

    def _check_sizes(self) -> None:
        """Compares the parameters with those that the driver lists of the function."""
        found: list[int] = []
        at, size = ctypes.c_size_t(), ctypes.c_size_t()
        about = _parameter_info()
        while about(self._function, len(found), ctypes.byref(at), ctypes.byref(size)) == 0:
            found.append(size.value)
        if found != self._bytes:
            raise NotImplementedError(f"the kernel takes parameters of {found} bytes, expected {self._bytes}")


class _TensorMap:
    """The tensor map (CUtensorMap) of tensors of one shape, written where the kernel's argument lies."""

    def __init__(self, tensor: Tensor, meta: dict[str, Any], area: Any) -> None:
        rank = tensor.dim()
        self._area, self._here, self._kept = ctypes.addressof(area), 0, dict[int, bytes]()
        self._room = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        at = ctypes.addressof(self._room)
        self._map = ctypes.c_void_p(at + -at % _MAP_ALIGNMENT)
        self._before = (self._map, _ELEMENTS[tensor.dtype], rank)
        steps = [step * tensor.element_size() for step in tensor.stride()[:-1]]
        self._after = (
            (ctypes.c_uint64 * rank)(*reversed(tensor.shape)),
            (ctypes.c_uint64 * (rank - 1))(*reversed(steps)),
            (ctypes.c_uint32 * rank)(*reversed(meta["block_size"])),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,
            meta["swizzle"],
            _PROMOTE_128_BYTES,
            0,
        )

    def point_to(self, address: int) -> None:
        """Makes the map one of the tensor at ``address``; maps of the last addresses are kept."""
        if address == self._here:
            return
        made = self._kept.get(address)
        if made is None:
            result = _driver().cuTensorMapEncodeTiled(*self._before, ctypes.c_void_p(address), *self._after)
            if result:
                raise RuntimeError(f"CUDA could not make a tensor map: error {result}")
            made = ctypes.string_at(self._map.value or 0, _MAP_BYTES)
            if len(self._kept) >= _MAPS_KEPT:
                self._kept.clear()
            self._kept[address] = made
        ctypes.memmove(self._area, made, _MAP_BYTES)
        self._here = address


@cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    launch = library.cuLaunchKernel
    launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return library


def _parameter_info() -> Callable[..., int]:
    try:
        return _driver().cuFuncGetParamInfo
    except AttributeError:
        raise NotImplementedError("a driver before CUDA 12.4") from None
