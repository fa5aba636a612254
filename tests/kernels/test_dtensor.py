"""Tensors spread over a mesh by batch or heads: each rank computes its own part, and the whole is one device's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from raybsa import BlockLayout, BlockSparseBase, block_sparse_attention, patterns

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
torch.manual_seed(0)
whole = [torch.randn(2, h, 40, 16) for h in (4, 2, 2)]
dense = torch.rand(8, 3, 3) < 0.6
mask, ids = torch.randn(2, 4, 40, 40), (torch.arange(40) // 25).expand(2, -1).contiguous()
LAYOUTS = {n: BlockLayout.from_dense(dense[:n], q_len=40, kv_len=40, q_block_size=16, causal=True) for n in (1, 4, 8)}


def spread(placement):
    return [distribute_tensor(x.clone(), mesh, [placement]).requires_grad_() for x in whole]


def check(name, got, wanted):
    torch.testing.assert_close(got.full_tensor(), wanted, msg=lambda m: f"{name}: {m}")


for groups, layout in LAYOUTS.items():
    bias = torch.randn(layout.nnz_blocks)
    for placement in (Shard(0), Shard(1), Replicate()):
        for backend in ("auto", "blocked"):
            options = {} if backend == "auto" else {"attn_mask": mask, "segment_ids": (ids, ids), "block_bias": bias}
            ours, one = spread(placement), [x.clone().requires_grad_() for x in whole]
            out, lse = block_sparse_attention(*ours, layout, backend=backend, return_lse=True, **options)
            wanted, wanted_lse = block_sparse_attention(*one, layout, backend=backend, return_lse=True, **options)
            name = f"{groups} groups, {placement}, {backend}"
            assert out.placements == (placement,), name
            check(name, out, wanted)
            check(name, lse, wanted_lse)
            out.square().sum().backward()
            wanted.square().sum().backward()
            for mine, theirs in zip(ours, one, strict=True):
                check(name, mine.grad, theirs.grad)

empty = [distribute_tensor(torch.zeros(0, h, 40, 16), mesh, [Shard(1)]) for h in (4, 2, 2)]
assert block_sparse_attention(*empty, LAYOUTS[1]).shape == (0, 4, 40, 16)

module = BlockSparseBase(pattern="bigbird", density=0.5, block_size=16, causal=True)
check("module", module(*spread(Shard(1))), module(*whole))
check("compiled", torch.compile(module, backend="aot_eager")(*spread(Shard(1))), module(*whole))

for wrong in (lambda: module(*spread(Shard(2))), lambda: module(spread(Shard(0))[0], *spread(Shard(1))[1:]),
              lambda: module(spread(Shard(0))[0], *whole[1:])):
    try:
        wrong()
    except NotImplementedError as error:
        assert "spread" in str(error), error
    else:
        raise AssertionError("it was not refused")
try:
    module.dropout = 0.5
    module.train()(*spread(Shard(1)))
except NotImplementedError as error:
    assert "dropout" in str(error)
else:
    raise AssertionError("dropout was not refused")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_mesh_gives_one_device_s_numbers(world_size: int, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world_size), str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    told = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(told)
