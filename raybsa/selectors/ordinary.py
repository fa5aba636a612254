"""Which tensors a learned selection can serve: those whose numbers are at hand when it runs."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not_ordinary(*tensors: Tensor) -> str | None:
    """What is wrong with the tensors for work that looks at their numbers and keeps what it made; None: nothing.

    Tensors of a transform, of a tracer or of no memory would leave themselves, or nothing, in layouts that are kept.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return (
            "torch.func's transforms (vmap, grad, jvp, ...) have none; samples go into the batch, gradients by backward"
        )
    if torch.jit.is_tracing():
        return "torch.jit.trace would keep the blocks of this one input for all others"
    for tensor in tensors:
        kind = type(tensor)
        if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            return f"got a {kind.__module__}.{kind.__name__}; a DTensor has its own in to_local(), others in their data"
        if tensor.is_meta:
            return "got a tensor on the meta device, which has none"
    modes = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in modes):
        return "FakeTensorMode and make_fx (torch.export) run without any"
    return None
