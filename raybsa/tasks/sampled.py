"""The exact attention of a few query blocks and its gradients, at any length: what kernels' results are checked with.

The upstream gradient is zero everywhere but in the sampled rows, so the gradients of all other rows are exactly zero,
and those of keys and values come from the sampled rows alone. O(sampled rows × their keys).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raybsa.kernels.call import AttentionCall

WHOLE_TOKENS = 8192  # a sequence up to this length is sampled whole, in two heads
SAMPLED_BLOCKS = 16  # of each of two heads of a longer one

Pick = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Parts:
    """Attention of the sampled rows of batch 0, float32.

    Args:
        out: (rows, D) of each pick (head, query block).
        of_q: (Sq, D) of each sampled head.
        of_k, of_v: (Skv, D) of each KV head that they read.
    """

    out: dict[Pick, Tensor]
    of_q: dict[int, Tensor]
    of_k: dict[int, Tensor]
    of_v: dict[int, Tensor]


def picks_of(call: AttentionCall) -> list[Pick]:
    """Query blocks of the first and the last head: all of a short sequence, else the ends, the middle, random ones."""
    blocks, heads = call.layout.num_q_blocks, sorted({0, call.q.shape[1] - 1})
    if call.q.shape[2] <= WHOLE_TOKENS:
        return [(head, block) for head in heads for block in range(blocks)]
    drawn = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))[:SAMPLED_BLOCKS].tolist()
    chosen = list(dict.fromkeys([0, blocks // 2, blocks - 1, *drawn]))[:SAMPLED_BLOCKS]
    return [(head, block) for head in heads for block in sorted(chosen)]


def sampled_gradient(call: AttentionCall, picks: list[Pick]) -> Tensor:
    """(B, H, Sq, D): an upstream gradient that is standard normal in the sampled rows and zero elsewhere."""
    grad_out = torch.zeros_like(call.q, requires_grad=False)
    generator = torch.Generator(call.q.device).manual_seed(1)
    for head, block in picks:
        rows = grad_out[0, head, _rows(call, block)]
        rows.copy_(torch.randn(rows.shape, generator=generator, device=rows.device))
    return grad_out


def sampled_attention(call: AttentionCall, picks: list[Pick], grad_out: Tensor, dtype: torch.dtype) -> Parts:
    """By plain torch operations in ``dtype``: float32 is the truth, the call's own dtype what rounding alone costs."""
    crow = call.layout.crow_indices.cpu()
    parts = Parts({}, {}, {}, {})
    for head, block in picks:
        kv_head, rows, keys = head // call.queries_per_kv, _rows(call, block), _keys(call, crow, head, block)
        taken = (call.q[0, head, rows], call.k[0, kv_head, keys], call.v[0, kv_head, keys])
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in taken)
        scores = q @ k.T * call.scale
        if call.layout.causal:
            position = torch.arange(call.q.shape[2], device=q.device)[rows]
            scores = scores.masked_fill(keys > position[:, None], float("-inf"))
        out = torch.softmax(scores, -1) @ v
        gradients = torch.autograd.grad(out, (q, k, v), grad_out[0, head, rows].to(dtype))
        parts.out[head, block] = out.detach().float()
        of_q, of_k, of_v = gradients
        _add(parts.of_q, head, rows, of_q, call.q)
        _add(parts.of_k, kv_head, keys, of_k, call.k)
        _add(parts.of_v, kv_head, keys, of_v, call.v)
    return parts


def _add(sums: dict[int, Tensor], head: int, place: slice | Tensor, found: Tensor, whole: Tensor) -> None:
    if head not in sums:
        sums[head] = torch.zeros(whole.shape[2:], device=whole.device)
    sums[head][place] += found.float()


def forward_error(out: Tensor, wanted: Parts, call: AttentionCall) -> float:
    """Max abs difference / max abs reference over the sampled rows of (B, H, Sq, D); nan where there is a nan."""
    return _relative([(out[0, head, _rows(call, block)], exact) for (head, block), exact in wanted.out.items()])


def gradient_error(gradients: tuple[Tensor, ...], wanted: Parts) -> float:
    """The largest of the three gradients' relative errors; what is not zero in other heads or samples is error too."""
    return max(map(_of_whole, gradients, (wanted.of_q, wanted.of_k, wanted.of_v)), key=_or_infinite)


def parts_error(found: Parts, wanted: Parts) -> tuple[float, float]:
    """(forward, gradient): the relative errors of one ``sampled_attention`` against another."""
    forward = _relative([(found.out[key], wanted.out[key]) for key in wanted.out])
    sides = ((found.of_q, wanted.of_q), (found.of_k, wanted.of_k), (found.of_v, wanted.of_v))
    return forward, max(_relative([(mine[key], theirs[key]) for key in theirs]) for mine, theirs in sides)


def _of_whole(found: Tensor, wanted: dict[int, Tensor]) -> float:
    """``found`` is (B, heads, S, D), zero in the heads and batch samples that were not sampled."""
    pairs = [(found[0, head], exact) for head, exact in wanted.items()]
    others = [head for head in range(found.shape[1]) if head not in wanted]
    strays = [found[0, head] for head in others] + list(found[1:])
    return _relative(pairs, strays)


def _relative(pairs: list[tuple[Tensor, Tensor]], strays: list[Tensor] | None = None) -> float:
    differences = [(found.float() - exact).abs().max() for found, exact in pairs]
    differences += [stray.abs().max().float() for stray in strays or ()]
    scale = torch.stack([exact.abs().max() for _, exact in pairs]).max()
    return float(torch.stack(differences).max() / scale)


def _or_infinite(error: float) -> float:
    return error if error == error else float("inf")


def _rows(call: AttentionCall, block: int) -> slice:
    size = call.layout.q_block_size
    return slice(block * size, min((block + 1) * size, call.q.shape[2]))


def _keys(call: AttentionCall, crow: Tensor, head: int, block: int) -> Tensor:
    """(n,) the key tokens that the block's list names."""
    layout = call.layout
    group = head if layout.num_groups > 1 else 0
    columns = layout.col_indices[int(crow[group, block]) : int(crow[group, block + 1])].long()
    keys = columns[:, None] * layout.kv_block_size + torch.arange(layout.kv_block_size, device=columns.device)
    keys = keys.reshape(-1)
    return keys[keys < call.k.shape[2]]
