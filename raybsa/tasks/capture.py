"""Capture: the q, k and v that a user's model attends with, to a file that other commands read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raybsa.variants.adaptive import BlockSparseAdaptive
from raybsa.variants.base import BlockSparseBase


@dataclass(frozen=True, eq=False)
class Captured:
    """One attention call, on the CPU: q (B, H, Sq, D), k and v (B, Hkv, Skv, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    scale: float | None = None


@contextmanager
def capture(model: nn.Module, calls: list[Captured], limit: int = 64) -> Iterator[list[Captured]]:
    """Appends to ``calls`` what ``model`` attends with inside the ``with`` block, in order, up to ``limit`` calls.

    Seen are calls of ``torch.nn.functional.scaled_dot_product_attention`` by that name, which is replaced meanwhile (so
    most models call it, ``nn.MultiheadAttention`` with ``need_weights=False`` in training), and this package's modules.
    Masks are not kept.
    """

    def keep(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> None:
        if len(calls) < limit:
            q, k, v = (x.detach().cpu().clone() for x in (q, k, v))
            calls.append(Captured(q, k, v, bool(causal), scale))

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        q, k, v = (*arguments, *(named[name] for name in "qkv"[len(arguments) :]))
        assert isinstance(module, (BlockSparseBase, BlockSparseAdaptive))
        keep(q, k, v, module.source.causal, module.scale)

    own = [module for module in model.modules() if isinstance(module, (BlockSparseBase, BlockSparseAdaptive))]
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in own]
    dense = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.dim() == 4:
            given = dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
            keep(query, key, value, given.get("is_causal", False), given.get("scale"))
        return dense(query, key, value, *args, **kwargs)

    F.scaled_dot_product_attention = watched
    try:
        yield calls
    finally:
        F.scaled_dot_product_attention = dense
        for hook in hooks:
            hook.remove()


def save_calls(calls: Sequence[Captured], path: str | Path) -> None:
    """Writes calls to a file of plain tensors."""
    torch.save([vars(call) for call in calls], path)


def load_calls(path: str | Path) -> list[Captured]:
    """The calls of a file that ``save_calls`` wrote, or of one dict with ``q``, ``k``, ``v`` and perhaps ``causal``.

    Raises:
        ValueError: another content.
        OSError: no such file.
    """
    wanted = f"{path} must hold dicts with q, k and v (B, H, S, D), as save_calls writes them"
    with open(path, "rb") as file:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of whatever kind the bytes make its unpickler stumble into
            first = next(iter(str(error).splitlines()), "")
            raise ValueError(f"{wanted}; torch.load says {type(error).__name__}: {first}") from error
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(map(_is_call, found)):
        raise ValueError(wanted)
    return [Captured(x["q"], x["k"], x["v"], bool(x.get("causal", False)), x.get("scale")) for x in found]


def _is_call(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(name), Tensor) and found[name].dim() == 4 for name in ("q", "k", "v")
    )
