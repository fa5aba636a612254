"""Launching through CUDA's driver: the bytes that a kernel would get, with a driver that only looks at them."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raybsa.kernels import triton_driver
from raybsa.kernels.triton_driver import Direct

POINTER_MAP_AND_NUMBERS = [8, 128, 4, 4, 4, 4, 8, 8, 8, 8, 4, 4, 8, 8]


class Driver:
    """Says that the kernel takes parameters of these sizes, and keeps what it is given."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.launched: list[tuple[tuple[int, ...], list[bytes]]] = []
        self.encoded: list[tuple[Any, ...]] = []

    def cuFuncGetParamInfo(self, function: Any, index: int, at: Any, size: Any) -> int:
        if index >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index]
        return 0

    def cuTensorMapEncodeTiled(self, target: Any, kind: int, rank: int, address: Any, *rest: Any) -> int:
        self.encoded.append((kind, rank, address.value, *[list(x) if i < 4 else x for i, x in enumerate(rest)]))
        ctypes.memmove(target, bytes([len(self.encoded)]) * 128, 128)
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:
        *numbers, parameters, _ = rest
        given = [ctypes.string_at(parameters[i], size) for i, size in enumerate(self.sizes)]
        self.launched.append((tuple(numbers), given))
        return 0


def compiled() -> Any:
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1, 64, 64], "fp4_padded": False}
    signature = {"out": "*bf16", "q": "tensordesc<bf16[1, 1, 64, 128]>", "mask": "constexpr", "step": "i32"}
    signature |= {"one": "constexpr", "scale": "fp32", "D": "constexpr"}
    return SimpleNamespace(
        function=1234,
        metadata=SimpleNamespace(num_warps=4, shared=1000, global_scratch_size=0, num_ctas=1, tensordesc_meta=[meta]),
        src=SimpleNamespace(signature=signature),
    )


def test_a_launch_gets_the_addresses_and_numbers_of_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(POINTER_MAP_AND_NUMBERS)
    monkeypatch.setattr(triton_driver, "_driver", lambda: driver)
    calls = [(torch.zeros(4, dtype=torch.bfloat16), torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16)) for _ in range(2)]
    direct = Direct(compiled(), (*calls[0], None), (7, 1))
    numbers = [(0.5,), (0.25,)]
    for place, (out, q) in enumerate(calls):
        for _ in range(2):
            direct((3 + place, 2), (out, q, None), numbers[place], 99)
    assert [grid for grid, _ in driver.launched] == [(3 + i, 2, 1, 128, 1, 1, 1000, 99) for i in (0, 0, 1, 1)]
    for place, (_, given) in enumerate(driver.launched):
        out, q = calls[place // 2]
        sizes = [(n, 4) for n in q.shape] + [(n, 8) for n in q.stride()]
        assert given[0] == out.data_ptr().to_bytes(8, "little")
        assert given[1] == bytes([1 + place // 2]) * 128
        assert given[2:10] == [n.to_bytes(width, "little") for n, width in sizes]
        assert given[10] == (7).to_bytes(4, "little")
        assert given[11] == bytes(ctypes.c_float(numbers[place // 2][0]))
        assert given[12:] == [bytes(8)] * 2
    assert driver.encoded == [
        (9, 4, q.data_ptr(), [128, 64, 2, 1], [256, 16384, 32768], [64, 64, 1, 1], [1, 1, 1, 1], 0, 3, 2, 0)
        for _, q in calls
    ]


@pytest.mark.parametrize("sizes", [POINTER_MAP_AND_NUMBERS[:-1], [*POINTER_MAP_AND_NUMBERS, 8], [8] * 14], ids=str)
def test_a_kernel_with_other_parameters_is_left_to_triton(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_driver, "_driver", lambda: Driver(sizes))
    tensors = (torch.zeros(4, dtype=torch.bfloat16), torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16), None)
    with pytest.raises(NotImplementedError, match="bytes, expected"):
        Direct(compiled(), tensors, (7, 1))


def test_a_failed_launch_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(POINTER_MAP_AND_NUMBERS)
    monkeypatch.setattr(triton_driver, "_driver", lambda: driver)
    tensors = (torch.zeros(4, dtype=torch.bfloat16), torch.zeros(1, 2, 64, 128, dtype=torch.bfloat16), None)
    direct = Direct(compiled(), tensors, (7, 1))
    monkeypatch.setattr(driver, "cuLaunchKernel", lambda *_: 700)
    with pytest.raises(RuntimeError, match="error 700"):
        direct((1, 1), tensors, (0.5,), 0)
