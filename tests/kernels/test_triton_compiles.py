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

# arch, block, head_dim, dtype, whether every feature is asked for, and whether loads have warps of their own
CASES = [
    (90, 128, 128, "bfloat16", False, False),
    (90, 128, 128, "bfloat16", False, True),
    (90, 64, 128, "bfloat16", False, True),
    (90, 32, 80, "float16", True, False),
    (80, 64, 64, "bfloat16", False, False),
]

# Runs the launches of one forward and backward a case with a driver that knows an H100's name but has none.
PROGRAM = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
    get_current_device = staticmethod(lambda: arch)  # Triton remembers the target of a device
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
run, seen = jit.JITFunction.run, {}

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    facts = {"arch": kernel.metadata.target.arch, "shared": kernel.metadata.shared}
    name = self.__name__ + (" in float32" if options.get("PART") else "")
    seen[name] = facts | {"tensor_cores": "mma" in kernel.asm["ptx"]}

jit.JITFunction.run = compile_only
from raybsa import BlockLayout
from raybsa.kernels import gluon_walk, triton_forward, triton_grad_kv, triton_grad_q, triton_plan
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.triton_arguments import Softmax

triton_plan.MIN_PART_TOKENS, triton_plan.SHARES = 64, 10**6
cut = triton_plan._cut  # as for a transient layout: nothing was written that could be read back
triton_plan._cut = lambda *arguments: cut(*arguments[:5], longest=10**6)

def compile_case(block, head_dim, dtype, everything, loads_apart):
    gluon_walk.is_hopper = lambda device: loads_apart
    tokens = 3 * block - (5 if everything else 0)
    layout = BlockLayout.from_rows(
        [[[0], [0, 1], [0, 1, 2]]] * 2, q_len=tokens, kv_len=tokens, q_block_size=block, causal=everything
    )
    q = torch.zeros(1, 2, tokens, head_dim, dtype=getattr(torch, dtype))
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    features = (None, None, None, 0.0)
    if everything:
        features = (ids[0].bool(), (ids, ids), torch.zeros(layout.nnz_blocks), 0.1)
    call = AttentionCall(q, q, q, layout, 0.1, *features, torch.tensor(7) if everything else None, False, True)
    out, lse = triton_forward.forward(call)
    forward, delta, dtype = Softmax(lse, out, lse), torch.empty_like(lse), q.dtype if loads_apart else torch.float32
    triton_grad_q.GradQ(call, forward, q, everything, dtype)(call, forward, delta, q)
    triton_grad_kv.GradKV(call, q, dtype)(call, forward, delta, q)
    if loads_apart:  # the part of a row's keys that a ring visits
        part = Softmax(lse)
        triton_grad_q.GradQ(call, part, q, False, torch.float32)(call, part, delta, q)
        triton_grad_kv.GradKV(call, q, torch.float32)(call, part, delta, q)

shown = []
for arch, *case in json.loads(sys.argv[1]):
    seen = {}
    compile_case(*case)
    shown.append(seen)
print(json.dumps(shown))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """By case: what each kernel was compiled for, its shared memory and whether it uses tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    shown = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        check=False,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    return json.loads(shown.stdout)


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_every_kernel_compiles(number: int, compiled: list[dict[str, dict]]) -> None:
    kernels = compiled[number]
    *_, loads_apart = CASES[number]
    assert kernels.pop("items_kernel")["arch"] == CASES[number][0]
    walk = "_walk" if loads_apart else ""
    attention = {f"{name}{walk}_kernel" for name in ("forward", "grad_q", "grad_kv")}
    attention |= {f"{name}_walk_kernel in float32" for name in ("grad_q", "grad_kv") if loads_apart}
    assert kernels.keys() == attention | {"merge_parts_kernel", "sum_parts_kernel"}
    arch = CASES[number][0]
    room = {90: 232_448, 80: 166_912}[arch]
    for name, kernel in kernels.items():
        assert kernel["arch"] == arch
        assert kernel["shared"] <= room, f"{name} wants {kernel['shared']} bytes of shared memory"
        assert kernel["tensor_cores"] or name not in attention
