"""The Triton kernels compile for an H100 down to machine code, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent

# Runs the launches of one forward and backward with a driver that knows an H100's name but has none.
PROGRAM = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[1]), 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
run, seen = jit.JITFunction.run, {}

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    seen[self.__name__] = {"shared": kernel.metadata.shared, "tensor_cores": "mma" in kernel.asm["ptx"]}

jit.JITFunction.run = compile_only
from raybsa import BlockLayout
from raybsa.kernels import triton_forward, triton_grad_kv, triton_grad_q, triton_plan
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.triton_arguments import Softmax

triton_plan.MIN_PART_TOKENS, triton_plan.SHARES = 64, 10**6
block, head_dim, dtype, everything = int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4]), sys.argv[5] == "1"
tokens = 3 * block - (5 if everything else 0)
layout = BlockLayout.from_rows(
    [[[0], [0, 1], [0, 1, 2]]] * 2, q_len=tokens, kv_len=tokens, q_block_size=block, causal=everything
)
q = torch.zeros(1, 2, tokens, head_dim, dtype=dtype)
ids = torch.zeros(1, tokens, dtype=torch.int64)
features = (ids[0].bool(), (ids, ids), torch.zeros(layout.nnz_blocks), 0.1) if everything else (None, None, None, 0.0)
call = AttentionCall(q, q, q, layout, 0.1, *features, 7, False, True)
out, lse = triton_forward.forward(call)
forward, delta = Softmax(lse, out, lse), torch.empty_like(lse)
triton_grad_q.GradQ(call, everything, torch.float32)(call, forward, delta, q)
triton_grad_kv.GradKV(call, torch.float32)(call, forward, delta, q)
print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    ("arch", "block", "head_dim", "dtype", "everything"),
    [(90, 128, 128, "bfloat16", False), (90, 32, 80, "float16", True), (80, 64, 64, "bfloat16", False)],
)
def test_every_kernel_compiles(
    arch: int, block: int, head_dim: int, dtype: str, everything: bool, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shown = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, (arch, block, head_dim, dtype, int(everything)))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    kernels = json.loads(shown.stdout)
    attention = {"forward_kernel", "grad_q_kernel", "grad_kv_kernel"}
    assert kernels.keys() == attention | {"merge_parts_kernel", "sum_parts_kernel"}
    room = {90: 232_448, 80: 166_912}[arch]
    for name, kernel in kernels.items():
        assert kernel["shared"] <= room, f"{name} wants {kernel['shared']} bytes of shared memory"
        assert kernel["tensor_cores"] or name not in attention
