"""Which tensors our kernels may read by their address, and which only an operator of torch may take."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from raybsa.kernels.call import AttentionCall

_ORDINARY = frozenset((Tensor, nn.Parameter))
_active = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._is_tracing
_modes_before_dispatch = torch._ops._len_torch_dispatch_stack_pre_dispatch


def is_ordinary(call: AttentionCall) -> bool:
    """Whether the call's tensors are plain numbers in memory, and nothing of torch's looks on at what becomes of them.

    Not so under ``torch.func`` transforms, forward-mode differentiation, ``torch.jit.trace``, ``make_fx`` and other
    dispatch modes (``FakeTensorMode``), nor for fake, distributed and other subclasses of Tensor.
    """
    if _somebody_looks_on():
        return False
    mask, bias, ids = call.attn_mask, call.block_bias, call.segment_ids
    return (
        type(call.q) in _ORDINARY
        and type(call.k) in _ORDINARY
        and type(call.v) in _ORDINARY
        and (mask is None or type(mask) in _ORDINARY)
        and (bias is None or type(bias) in _ORDINARY)
        and (ids is None or (type(ids[0]) in _ORDINARY and type(ids[1]) in _ORDINARY))
    )


def _somebody_looks_on() -> bool:
    return bool(_active() or _modes() or _tracing() or forward_ad._current_level >= 0 or _modes_before_dispatch())


def why_no_numbers(*tensors: Tensor) -> str | None:
    """Why work that looks at the tensors' numbers, and keeps some of what it makes, cannot run; None: it can.

    Under a transform or a tracer, what is kept would be a part of it, or the choice of one input would serve all.
    """
    if _active() or forward_ad._current_level >= 0:
        return (
            "within torch.func's transforms (vmap, grad, jvp, ...) there are none; put samples into the batch, and "
            "take gradients by backward"
        )
    if _tracing():
        return "torch.jit.trace would keep what follows from this one input for every other"
    keys = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
    if _modes() and any(torch._C._get_dispatch_mode(key) is not None for key in keys):
        return "under FakeTensorMode, make_fx or torch.export there are none"
    for tensor in tensors:
        kind = type(tensor)
        if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
            return f"got a {kind.__name__}, which is no plain tensor (of a DTensor give to_local())"
        if tensor.is_meta:
            return "got a tensor on the meta device, which has none"
    return None


def check_numbers_at_hand(what: str, *tensors: Tensor) -> None:
    """Raises NotImplementedError, in ``what``'s name, where ``why_no_numbers`` has a reason."""
    problem = why_no_numbers(*tensors)
    if problem is not None:
        raise NotImplementedError(f"{what} needs tensors whose numbers are at hand: {problem}")


def forward_mode() -> bool:
    """Whether tensors may carry tangents, of ``torch.func.jvp`` or of ``torch.autograd.forward_ad``."""
    if forward_ad._current_level >= 0:
        return True
    if not _active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def under_transforms() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    found: bool = _active()
    return found


def has_numbers(x: Tensor) -> bool:
    """Whether a tensor has numbers that can be read: it is neither fake nor on the meta device."""
    if x.is_meta:
        return False
    if type(x) in _ORDINARY and not _modes():
        return True
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(x):
        parts = [getattr(x, name) for name in x.__tensor_flatten__()[0]]
        return all(has_numbers(part) for part in parts if isinstance(part, Tensor))
    return not isinstance(x, FakeTensor)


def is_shape_alone(x: Tensor) -> bool:
    """Whether a tensor has no numbers, and nothing that is done to it is kept to be done again with numbers."""
    if has_numbers(x):
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is None and not torch.compiler.is_compiling()


def has_one_layout(q: Tensor, k: Tensor) -> bool:
    """Whether what is compiled is an exported program of one length: it then holds the layout itself."""
    if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
        return False
    return isinstance(q.shape[2], int) and isinstance(k.shape[2], int) and isinstance(q.shape[1], int)


def is_distributed(call: AttentionCall) -> bool:
    """Whether q, k or v is spread over a mesh of devices (DTensor)."""
    tensors = (call.q, call.k, call.v)
    if all(type(x) in _ORDINARY for x in tensors) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(x, DTensor) for x in tensors)
