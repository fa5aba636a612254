"""One of two processes of ``test_ddp.py``: trains under DDP with each codec's hook and saves what came of it."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raybsa import gradients

CODECS = ["none", "fp16", "bf16", "int8", {"name": "topk", "params": {"density": 0.2}}, "powersgd"]


class Model(nn.Module):
    """A network with a layer that only some ranks use, as DDP's ``find_unused_parameters`` allows."""

    def __init__(self, uses_detour: bool) -> None:
        super().__init__()
        self.first, self.detour, self.last = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 4)
        self.uses_detour = uses_detour

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.detour(hidden)) if self.uses_detour else hidden)


def train(codec, rank: int, steps: int = 25) -> dict:
    torch.manual_seed(0)
    model = Model(uses_detour=rank == 1)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.005, find_unused_parameters=True)
    hook = None if codec is None else gradients.ddp_hook(codec, warmup_steps=1)
    if hook is not None:
        ddp.register_comm_hook(None, hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(rank))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (ddp(x) - x[:, :4]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    residuals = 0.0 if hook is None else sum(state.norm() for state in hook.states.values())
    return {"losses": losses, "weights": [p.detach() for p in model.parameters()], "residuals": residuals}


def main() -> None:
    rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {"plain": train(None, rank)}
    for codec in CODECS:
        results[codec if isinstance(codec, str) else codec["name"]] = train(codec, rank)
    torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
