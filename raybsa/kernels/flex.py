"""FlexAttention as a backend."""

from __future__ import annotations

from torch import Tensor

from raybsa.kernels.call import AttentionCall


def why_not(call: AttentionCall) -> str | None:
    """Why FlexAttention cannot serve this call; None where it can."""
    return "it is not wired in yet"


def run(call: AttentionCall, with_lse: bool) -> tuple[Tensor, Tensor]:
    raise NotImplementedError
