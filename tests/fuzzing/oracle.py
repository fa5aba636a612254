"""Dense attention under an explicit mask, written here alone: nothing of the product is called."""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float,
    added: Tensor | None = None,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, Sq, Dv), lse (B, H, Sq) and the weights (B, H, Sq, Skv), differentiable any number of times.

    Args:
        seen: (B, H, Sq, Skv) bool: what a query may attend.
        added: broadcastable to that, added to the scores; -inf hides.
        factor: (B, H, Sq, Skv) on the weights: dropout.
    """
    copies = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if added is not None:
        seen = seen & (added != -INF)
        scores = scores + torch.where(seen, added, 0.0)
    alive = seen.any(-1, keepdim=True)
    scores = torch.where(seen, scores, -INF)
    scores = torch.where(alive, scores, 0.0)
    weights = torch.softmax(scores, -1) * alive
    lse = torch.where(alive[..., 0], _logsumexp(scores), -INF) if k.shape[2] else scores.sum(-1) - INF
    kept = weights if factor is None else weights * factor
    return kept @ v, lse, kept


def _logsumexp(scores: Tensor) -> Tensor:
    """torch's own has gradients ``exp(score - lse)``, which sum to more than 1 where lse is too large to hold a
    logarithm beside it."""
    top = scores.detach().amax(-1, keepdim=True)
    return torch.log(torch.exp(scores - top).sum(-1)) + top[..., 0]


def dropped(seed: int, p: float, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """(B, H, Sq, Skv) float64: 0 where the weight is dropped, else ``1 / (1 - p)``, by the documented hash of seed,
    stream 2, ``b * H + h``, row and column."""
    batch, heads, rows, columns = shape
    state = torch.zeros((), dtype=torch.int64, device=device)
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    words = (
        seed & 0xFFFFFFFF,
        2,
        head,
        torch.arange(rows, device=device)[:, None],
        torch.arange(columns, device=device),
    )
    for word in words:
        state = _mix(state ^ word)
    uniform = (state >> 8).double() / 2**24
    return (uniform >= torch.tensor(p, dtype=torch.float32, device=device)).double() / (1.0 - p)


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
