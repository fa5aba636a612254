"""Gradients: codecs that make them small, and the exchange that makes them the same on every rank.

>>> from raybsa import gradients
>>> exchange = gradients.GradientExchange(model.named_parameters(), gradients.build("powersgd", rank=4), communicator)
>>> loss.backward()
>>> exchange.finish()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raybsa.gradients.catalog import CATALOG, build
    from raybsa.gradients.codec import Codec, Payload
    from raybsa.gradients.ddp import ddp_hook
    from raybsa.gradients.exchange import GradientExchange
    from raybsa.gradients.state import State

_HOMES = {
    "CATALOG": "raybsa.gradients.catalog",
    "Codec": "raybsa.gradients.codec",
    "GradientExchange": "raybsa.gradients.exchange",
    "Payload": "raybsa.gradients.codec",
    "State": "raybsa.gradients.state",
    "build": "raybsa.gradients.catalog",
    "ddp_hook": "raybsa.gradients.ddp",
}

__all__ = ["CATALOG", "Codec", "GradientExchange", "Payload", "State", "build", "ddp_hook"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raybsa.gradients' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
