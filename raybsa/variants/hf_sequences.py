"""Padded batches, each sequence as if it were alone: its blocks count from its own first token; for ``hf`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from raybsa.kernels.ordinary import check_numbers_at_hand

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def one_by_one(attend: Attend, q: Tensor, k: Tensor, v: Tensor, whole: Tensor | None, keys: Tensor) -> Tensor:
    """(B, Sq, H, Dv): ``attend`` over each sequence's own tokens, those of equal padding together; 0 for padding.

    Args:
        attend: q, k, v and mask of some sequences without padding -> (b, H, Sq, Dv).
        q, k, v: as attention takes them; the queries are the last ones of the keys' tokens.
        whole: broadcastable to (B, H, Sq, Skv), or None.
        keys: (B, Skv) bool, True for tokens that are no padding.
    """
    check_numbers_at_hand("attention over a padded batch", keys, q)
    before = k.shape[2] - q.shape[2]
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    if whole is not None:
        whole = whole.expand(q.shape[0], -1, q.shape[2], k.shape[2])
    for samples, own in _alike(keys):
        asked = own[own >= before] - before
        if not asked.numel():
            continue
        mask = None if whole is None else whole[samples][:, :, asked][..., own]
        found = attend(q[samples][:, :, asked], k[samples][:, :, own], v[samples][:, :, own], mask)
        out[samples[:, None], asked] = found.transpose(1, 2)
    return out


def from_first(attend: Attend, q: Tensor, k: Tensor, v: Tensor, whole: Tensor | None, keys: Tensor) -> Tensor:
    """(B, S, H, Dv): one call of ``attend`` with each sequence rolled so that its first token comes first.

    Arguments as in ``one_by_one``, with as many queries as keys.
    """
    first = keys.to(torch.int8).argmax(1, keepdim=True)
    place = torch.arange(keys.shape[1], device=keys.device)
    rolled, back = (place + first) % keys.shape[1], (place - first) % keys.shape[1]
    mask = keys.gather(1, rolled)[:, None, None, :]
    if whole is not None:
        whole = whole.expand(q.shape[0], -1, q.shape[2], k.shape[2])
        whole = whole.take_along_dim(rolled[:, None, :, None], 2).take_along_dim(rolled[:, None, None, :], 3)
        mask = whole & mask
    q, k, v = (x.take_along_dim(rolled[:, None, :, None], 2) for x in (q, k, v))
    found = attend(q, k, v, mask)
    return found.take_along_dim(back[:, None, :, None], 2).transpose(1, 2)


def _alike(keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples whose tokens are at the same places, (b,) int64, and these places, (n,) int64."""
    kinds: dict[bytes, list[int]] = {}
    for sample, row in enumerate(keys.cpu().numpy()):
        kinds.setdefault(row.tobytes(), []).append(sample)
    for samples in kinds.values():
        yield torch.tensor(samples, device=keys.device), keys[samples[0]].nonzero()[:, 0]
