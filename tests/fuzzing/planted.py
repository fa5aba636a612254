"""Backends with a fault each, for the fuzzer to find."""

from __future__ import annotations

import os
import signal

from torch import Tensor

from raybsa.kernels import blocked
from raybsa.kernels.call import AttentionCall


class Ragged:
    """Wrong where the last block of queries is ragged: its last token comes out too large."""

    @staticmethod
    def why_not(call: AttentionCall) -> str | None:
        return None

    @staticmethod
    def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        out, lse = blocked.run(call)
        if call.layout.q_tokens % call.layout.q_block_size:
            out = out * out.new_tensor([1.0] * (out.shape[2] - 1) + [1.01])[:, None]
        return out, lse


class Crashes(Ragged):
    """Ends the process where there are masks."""

    @staticmethod
    def run(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if call.attn_mask is not None:
            os.kill(os.getpid(), signal.SIGSEGV)
        return blocked.run(call)
