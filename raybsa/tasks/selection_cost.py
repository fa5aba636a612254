"""What a learned selection costs: a forward with it beside the same forward with a fixed pattern, timed in turn.

    python -m raybsa.tasks.selection_cost --tokens 8192                                        # this machine's CPU
    python -m raybsa.tasks.selection_cost --tokens 32768 --device cuda --dtype bfloat16        # 8 heads x 64, 5 %
    python -m raybsa.tasks.selection_cost --tokens 32768 --device cuda --dtype bfloat16 --graph    # the GPU's part
    python -m raybsa.tasks.selection_cost --tokens 1048576 --max-blocks 64 --heads 1 --select-only   # memory

Time is that of inference. Peak memory is that of a call of its own, beyond q, k and v.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable

import torch

from raybsa.counter import Stream, normal
from raybsa.timing import DeviceLock, forward_call, measure_in_turn, peak_bytes
from raybsa.variants.adaptive import BlockSparseAdaptive
from raybsa.variants.base import BlockSparseBase


def main() -> None:
    arguments = _arguments()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    count = 2 if arguments.select_only else 3
    q, k, *v = (
        _random(stream, arguments, device).to(dtype) for stream in (Stream.QUERY, Stream.KEY, Stream.VALUE)[:count]
    )
    shared = {"density": arguments.density, "block_size": arguments.block_size, "causal": arguments.causal}
    torch.manual_seed(0)
    adaptive = BlockSparseAdaptive(
        None, None, arguments.heads, arguments.head_dim, max_blocks=arguments.max_blocks, **shared
    ).to(device)
    adaptive.eval()
    calls: dict[str, Callable[[], object]] = {"selection": _selection(adaptive, q, k)}
    if not arguments.select_only:
        fixed = BlockSparseBase(pattern=arguments.pattern, **shared)
        calls["fixed"] = forward_call(fixed, (q, k, *v))
        calls["adaptive"] = forward_call(adaptive, (q, k, *v))
    if arguments.graph:
        calls = {name: _replayed(call) for name, call in calls.items()}
    with DeviceLock(device).exclusive():
        times = measure_in_turn(list(calls.values()), device, repeats=arguments.repeats, budget_s=20.0)
    for name, found in zip(calls, times, strict=True):
        print(f"{name:<10} p20 {found.p20:.3f}  p50 {found.p50:.3f}  p80 {found.p80:.3f} ms of {found.repeats} calls")
    if not arguments.select_only:
        print(f"selection adds {times[2].p50 / times[1].p50 - 1:.1%} to the fixed pattern's forward")
    layout = adaptive.source.select(q, k).layout
    print(f"{layout}")
    print(f"peak of a selection {peak_bytes(calls['selection'], device) / 2**20:.1f} MiB beyond q and k, ", end="")
    print(f"largest resident size of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


def _replayed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: what the GPU takes for it, without what the host takes to launch it."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are compiled and plans made outside of the graph
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def _selection(adaptive: BlockSparseAdaptive, q: torch.Tensor, k: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return adaptive.source.select(q, k)

    return call


def _random(stream: Stream, arguments: argparse.Namespace, device: torch.device) -> torch.Tensor:
    """(1, heads, tokens, head_dim) standard normal, a head at a time: the counters of all would need much memory."""
    token = torch.arange(arguments.tokens, device=device)[:, None]
    channel = torch.arange(arguments.head_dim, device=device)
    heads = [normal(0, stream, torch.tensor(head, device=device), token, channel) for head in range(arguments.heads)]
    return torch.stack(heads)[None]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--max-blocks", type=int, help="the most blocks a row keeps")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--pattern", default="random", help="the fixed pattern")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--graph", action="store_true", help="replay each call as a CUDA graph")
    parser.add_argument("--select-only", action="store_true", help="no attention, for lengths at which it takes long")
    arguments = parser.parse_args()
    if arguments.graph and not arguments.device.startswith("cuda"):
        parser.error(f"--graph wants a CUDA device, got --device {arguments.device}")
    return arguments


if __name__ == "__main__":
    main()
