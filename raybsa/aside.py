"""Work beside what torch is doing: on plain tensors, seen by no mode, transform or tracer.

A layout is made once and used by many calls. What it is made of must not belong to the call that happens to be first:
a fake tensor, a tensor of a ``torch.func`` transform or a node of a trace would be of no use, or wrong, in the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

_tracing = torch._C._is_tracing


@contextmanager
def aside() -> Iterator[None]:
    """Within it tensors are made as if torch had no mode, transform, tracer or inference mode at work."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # such tensors could not take part in a later training step
        stack.enter_context(torch._C.DisableTorchFunction())  # of a mode that says the default device, among others
        stack.enter_context(untraced())
        if torch._C._are_functorch_transforms_active():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        if torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch():
            from torch.utils._python_dispatch import _disable_current_modes

            stack.enter_context(_disable_current_modes())
        yield


def _nothing_at_work() -> bool:
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or torch.is_inference_mode_enabled()
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    )


Made = TypeVar("Made")


class made_aside(cached_property[Made]):
    """A ``cached_property`` that is made aside, whoever is the first to ask."""

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> Any:
        if instance is None:
            return self
        if _nothing_at_work():
            return super().__get__(instance, owner)
        with aside():
            return super().__get__(instance, owner)


@contextmanager
def untraced() -> Iterator[None]:
    """Within it ``torch.jit.trace`` sees nothing, and sizes are plain numbers."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    set_state = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        yield
    finally:
        set_state(state)


def shape_of(x: Tensor) -> torch.Size:
    """A tensor's shape as plain numbers, also while ``torch.jit.trace`` records sizes as tensors."""
    if torch.compiler.is_compiling() or not _tracing():
        return x.shape
    with untraced():
        return x.shape
