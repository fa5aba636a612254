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
from torch.overrides import TorchFunctionMode

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

    Seen are calls of ``F.scaled_dot_product_attention``, as most models make them (``nn.MultiheadAttention`` with
    ``need_weights=False``), and this package's modules. Masks are not kept.
    """

    def keep(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> None:
        if len(calls) < limit:
            q, k, v = (x.detach().cpu().clone() for x in (q, k, v))
            calls.append(Captured(q, k, v, bool(causal), scale))

    def before(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        q, k, v = (*arguments, *(named[name] for name in "qkv"[len(arguments) :]))
        assert isinstance(module, (BlockSparseBase, BlockSparseAdaptive))
        causal = module.source.layout(q.shape[2], k.shape[2], q.shape[1], torch.device("cpu")).causal
        keep(q, k, v, causal, module.scale)

    own = [module for module in model.modules() if isinstance(module, (BlockSparseBase, BlockSparseAdaptive))]
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in own]
    try:
        with _Watch(keep):
            yield calls
    finally:
        for hook in hooks:
            hook.remove()


class _Watch(TorchFunctionMode):
    """Tells ``keep`` of every call of scaled_dot_product_attention with tensors (B, H, S, D)."""

    def __init__(self, keep: Any) -> None:
        super().__init__()
        self._keep = keep

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | kwargs
            if given["query"].dim() == 4:
                tensors = (given[name] for name in names[:3])
                self._keep(*tensors, given.get("is_causal", False), given.get("scale"))
        return function(*args, **kwargs)


def save_calls(calls: Sequence[Captured], path: str | Path) -> None:
    """Writes calls to a file of plain tensors."""
    torch.save([vars(call) for call in calls], path)


def load_calls(path: str | Path) -> list[Captured]:
    """The calls of a file that ``save_calls`` wrote, or of one dict with ``q``, ``k``, ``v`` and perhaps ``causal``.

    Raises:
        ValueError: another content.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(x, dict) and {"q", "k", "v"} <= x.keys() for x in found):
        raise ValueError(f"{path} must hold dicts with q, k and v (B, H, S, D), as save_calls writes them")
    return [Captured(x["q"], x["k"], x["v"], bool(x.get("causal", False)), x.get("scale")) for x in found]
