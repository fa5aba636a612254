"""Which tensors a learned selection can serve: those whose numbers are at hand when it runs."""

from __future__ import annotations

import torch
from torch import Tensor


def why_not_ordinary(*tensors: Tensor) -> str | None:
    """Why work that looks at the tensors' numbers, and keeps some of what it makes, cannot run; None: it can.

    Under a transform or a tracer, what is kept would be a part of it, or the blocks of one input would serve all.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return (
            "within torch.func's transforms (vmap, grad, jvp, ...) there are none; put samples into the batch, and "
            "take gradients by backward"
        )
    if torch.jit.is_tracing():
        return "torch.jit.trace would keep the blocks of this one input for every other"
    modes = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in modes):
        return "under FakeTensorMode, make_fx or torch.export there are none"
    for tensor in tensors:
        kind = type(tensor)
        if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            return f"got a {kind.__name__}, which is no plain tensor (of a DTensor give to_local())"
        if tensor.is_meta:
            return "got a tensor on the meta device, which has none"
    return None
