"""The kernels of a selection equal the torch operations, on the CPU under Triton's interpreter and on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raybsa.kernels import triton_setup
from raybsa.selectors.gate import Gate, position_waves
from raybsa.selectors.pooling import block_stats, blocks_before, key_features, query_features
from raybsa.selectors.rules import Rules
from raybsa.selectors.selection import best_columns
from raybsa.selectors.shape import Shape
from raybsa.selectors.topk import top_columns

pytest.importorskip("triton")
from raybsa.selectors.triton_gate import gated
from raybsa.selectors.triton_pool import pooled
from raybsa.selectors.triton_select import choose


@pytest.fixture(autouse=True)
def needs_a_gpu_or_the_interpreter(device: str) -> None:
    if device == "cpu" and not triton_setup.interpreting():
        pytest.skip("TRITON_INTERPRET is not set")
    triton_setup.repair_interpreter()


@pytest.mark.parametrize(
    ("causal", "q_len", "kv_len", "sinks", "window", "density"),
    [
        (False, 100, 160, 2, 3, 0.4),
        (True, 128, 128, 0, 1, 0.3),
        (True, 250, 121, 1, 2, 0.5),
        (False, 60, 130, 0, 2, 1.0),
    ],
)
def test_it_chooses_what_a_stable_sort_chooses(device, causal, q_len, kv_len, sinks, window, density):
    shape = Shape.make(Rules(16, causal, sinks=sinks, window=window), q_len, kv_len, density, device)
    u = torch.randn(1, 2, len(shape.rows), 3, device=device).round()  # many ties, zeros of both signs
    w = torch.randn(1, 2, shape.columns, 3, device=device).round()
    w[0, 1, 2] *= 1e30
    wanted = shape.columns_of(best_columns(u, w, shape))
    found = torch.full_like(wanted, -1)
    scores = (u @ w.transpose(-1, -2)).flatten(0, 1)
    for first, some in ((0, scores[:, :3]), (3, scores[:, 3:])):
        choose(some.contiguous(), shape, first, found)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_the_lowest_finite_scores_come_last_from_the_lowest_column_on(device, causal):
    shape = Shape.make(Rules(16, causal), 250, 250, 0.6, device)
    scores = torch.randn(3, len(shape.rows), shape.columns, device=device)
    scores[0, :, 1::2], scores[1, :, 3:] = -3.0e38, torch.finfo(torch.float32).min
    scores[2] = -3.0e38
    best = top_columns(shape.rules.preferences(scores[None], shape.rows), shape.widest)
    wanted = shape.columns_of(best)
    found = torch.full_like(wanted, -1)
    choose(scores, shape, 0, found)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_gate_s_vectors_are_those_of_torch(device, causal, copies):
    gate = Gate(2, copies, 20, 12).to(device).requires_grad_(False)
    for parameter in gate.parameters():
        parameter.normal_()
    q = torch.randn(2, 77, 2 * copies, 20, device=device).transpose(1, 2) - 1
    k = torch.randn(2, 2, 50, 20, device=device)
    waves = position_waves(5, device)
    u, w = gated(q, k, gate, waves, 16, causal)
    own, keys = block_stats(q.cpu(), 16).to(device), block_stats(k.cpu(), 16).to(device)
    features = query_features(own, blocks_before(own) if causal else None, 2)
    torch.testing.assert_close(u, gate.queries(features, waves))
    torch.testing.assert_close(w, gate.keys(key_features(keys), waves[:4]))


@pytest.mark.parametrize("tokens", [5, 64, 77])
def test_it_pools_as_torch_does(device, tokens):
    x = torch.randn(2, tokens, 3, 20, device=device).transpose(1, 2) - 1
    torch.testing.assert_close(pooled(x, 16), block_stats(x.cpu(), 16).to(device))


PROGRAM = """
import sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
run = jit.JITFunction.run

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    print(self.__name__, kernel.metadata.shared)

jit.JITFunction.run = compile_only
from raybsa.selectors.rules import Rules
from raybsa.selectors.shape import Shape
from raybsa.selectors.triton_pool import pooled
from raybsa.selectors.gate import Gate, position_waves
from raybsa.selectors.triton_gate import gated
from raybsa.selectors.triton_select import choose

for dtype, size, head_dim in ((torch.float32, 128, 80),):
    pooled(torch.zeros(1, 2, 300, head_dim, dtype=dtype), size)
for blocks in (512, 16384):
    shape = Shape.make(Rules(16, True, max_blocks=4), 16 * blocks, 16 * blocks, 0.1, "cpu")
    choose(torch.zeros(1, 2, blocks), shape, 0, torch.zeros(1, len(shape.row), dtype=torch.int32))
gated(*[torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16)] * 2, Gate(2, 1, 64, 32), position_waves(5, "cpu"), 64, True)
"""


def test_the_kernels_compile_for_an_h100(device: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shown = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    kernels = [line.split() for line in shown.stdout.splitlines()]
    assert [name for name, _ in kernels] == ["pool_kernel", *["select_kernel"] * 2, *["gate_kernel"] * 2]
    assert max(int(shared) for _, shared in kernels) <= 227 << 10
