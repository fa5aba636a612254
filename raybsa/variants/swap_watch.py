"""Watched modules: what torch's attention is asked while one of them is at work, its service answers; for ``swap``.

Which module is at work lives in its call: in a mode on the stack that torch keeps for each thread. So threads, replicas
of ``nn.DataParallel`` and tasks of asyncio, whose forwards come one after the other, do not meet. A watched module's
class is one made from its own, with the same name, so that whatever ends the call takes it back (of torch's hooks none
hears of a KeyboardInterrupt), and so that copies and pickles are watched too.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from functools import wraps
from threading import Lock, get_ident
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack

from raybsa.kernels.eager import eagerly

SDPA, MULTIHEAD = F.scaled_dot_product_attention, F.multi_head_attention_forward  # whatever F holds later
_OPERATORS = (OpOverload, OpOverloadPacket)
_SERVICE = "_raybsa_service"  # in a watched module's __dict__
_FORGETS = "{}: it is copied or pickled in a way of its own, which forgets that it is swapped: undo that first"
_MAKING = Lock()
_NEW = object().__reduce_ex__(2)[0]  # by which what says nothing of copies is made again


class Service(Protocol):
    """What serves a module's attention. It goes along where the module is copied, replicated or pickled."""

    @property
    def name(self) -> str:
        """The module's, in ``named_modules``."""
        ...

    def attend(
        self, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What ``function``, one of ``is_attention``, returns to ``module``: the one at work, it or a replica of it."""
        ...


def watch(module: nn.Module, service: Service, becomes: type[nn.Module] | None = None) -> Callable[[], None]:
    """From now on ``service`` answers what the module asks of torch's attention in its own forward.

    Args:
        becomes: the class that it is watched as; None is its own.

    Returns:
        What undoes it.

    Raises:
        NotImplementedError: it is watched already, or its calls cannot be watched; the message names it.
    """
    before, name = type(module), named(service.name)
    if service_of(module) is not None:
        raise NotImplementedError(f"{name}: it is swapped already, undo that first")
    if isinstance(module, torch.jit.ScriptModule):
        raise NotImplementedError(f"{name}: a module in Python was wanted, got TorchScript, which nobody sees into")
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        raise NotImplementedError(f"{name}: a model that is not compiled was wanted, got torch.compile")
    ours = watched(becomes or before)
    try:
        module.__class__ = ours
    except TypeError as error:
        raise NotImplementedError(f"{name}: a class that can be derived from was wanted: {error}") from error
    module.__dict__[_SERVICE] = service

    def undo() -> None:
        module.__dict__.pop(_SERVICE, None)
        if type(module) is ours:  # a lazy module has another when its sizes are known
            module.__class__ = before

    return undo


def check_uncovered(model: nn.Module) -> None:
    """Raises RuntimeError where a class was laid over that of a watched module, which could not be given back."""
    for module in model.modules():
        if isinstance(module, Watched) and Watched not in type(module).__bases__:
            name, now = named(service_of(module).name), type(module).__qualname__
            raise RuntimeError(f"{name}: its class has become {now} since, undo that first")


def service_of(module: nn.Module) -> Any:
    """The module's service; None where it is not watched."""
    return module.__dict__.get(_SERVICE)


def is_attention(function: Any) -> bool:
    """Whether this is torch's attention, by whatever name."""
    return function in (SDPA, MULTIHEAD) or (type(function) in _OPERATORS and "scaled_dot_product" in str(function))


def named(name: str) -> str:
    return f"module {name!r}" if name else "the model itself"


# ---- the class of a watched module -----------------------------------------------------------------------------------


class Watched:
    """What a module's class is mixed with."""

    def __init_subclass__(cls, **_: Any) -> None:
        """The original's is not told: a list of a family's classes gets no second one of the same name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _uncompiled(self, self.__call__, args, kwargs)
        return _at_work(self, super().__call__, args, kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy or a pickle names the original class: the one of ours is made where it is made again."""
        graph = isinstance(self, torch.fx.GraphModule)  # whose copies are made from its graph
        reduced: Any = None if graph else super().__reduce_ex__(max(2, protocol))
        if reduced is None or reduced[0] is not _NEW or Watched not in type(self).__bases__:
            raise NotImplementedError(_FORGETS.format(named(self.__dict__[_SERVICE].name)))
        return (_made_again, (type(self).__bases__[1], *reduced[1][1:]), *reduced[2:])

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"{named(self.__dict__[_SERVICE].name)}: a model that stays in Python was wanted, got torch.jit.script"
        )


def watched(base: type[nn.Module]) -> type[Any]:
    """The class of watched modules whose own class is ``base``: the same one for all, as long as there is any."""
    with _MAKING:
        for known in type.__subclasses__(base):
            if known.__bases__ == (Watched, base):
                return known
        same = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
        made: Any = types.new_class(base.__name__, (Watched, base), exec_body=lambda namespace: namespace.update(same))

        @wraps(base.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Also for those who do without the module's call; a lazy module's class may have changed since it began.
            if torch.compiler.is_compiling():
                return _uncompiled(self, self.forward, args, kwargs)
            own = super(made, self).forward if isinstance(self, made) else base.forward.__get__(self)
            return _at_work(self, own, args, kwargs)

        def deep_copy(self: Any, memo: dict[int, Any]) -> Any:
            graph = isinstance(self, torch.fx.GraphModule)
            copied = None if graph else super(made, self).__deepcopy__(memo)
            if copied is None or service_of(copied) is None or type(copied) is not type(self):
                raise NotImplementedError(_FORGETS.format(named(service_of(self).name)))
            return copied

        made.forward = forward
        if hasattr(base, "__deepcopy__"):
            made.__deepcopy__ = deep_copy
        if issubclass(base, torch.fx.GraphModule):
            made.recompile = _refuse_recompile
        return made


def _refuse_recompile(self: Any) -> Any:
    raise NotImplementedError(
        f"{named(service_of(self).name)}: its graph would be compiled into a call that forgets that it is swapped: "
        "undo that first"
    )


def _made_again(base: type[nn.Module], *args: Any) -> nn.Module:
    made = base.__new__(base, *args)
    made.__class__ = watched(base)
    return made


# ---- who is at work --------------------------------------------------------------------------------------------------


class _AtWork(TorchFunctionMode):
    """A thread's mode while watched modules are at work in it: torch's attention goes to the innermost one's service.

    There is one, whatever their number, since each mode on the stack costs every function of torch's.
    """

    def __init__(self, module: nn.Module, service: Service) -> None:
        super().__init__()
        self.module, self.service = module, service
        self.thread = get_ident()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_attention(func):
            return func(*args, **(kwargs or {}))
        return self.service.attend(self.module, func, args, kwargs or {})


def _at_work(module: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``function(*args, **kwargs)``, which is the module's call or forward, with the module at work."""
    service = service_of(module)
    if service is None:  # undone
        return function(*args, **kwargs)
    mode = _mode()
    if mode is None:
        with _AtWork(module, service):
            return _ended(service, function(*args, **kwargs))
    if mode.module is module:
        return _ended(service, function(*args, **kwargs))
    before = mode.module, mode.service
    mode.module, mode.service = module, service
    try:
        return _ended(service, function(*args, **kwargs))
    finally:
        mode.module, mode.service = before


def _uncompiled(module: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``call(*args, **kwargs)``, outside of the graph that is being traced: it would hold torch's attention, dense."""
    if torch.compiler.is_exporting():
        raise NotImplementedError(f"{named(service_of(module).name)}: an exported graph cannot hold it, it is swapped")
    return eagerly(call, *args, **kwargs)


def _mode() -> _AtWork | None:
    """This thread's mode where it is on the stack: neither one that autograd took along to a thread of its own, nor one
    that is busy with a function of torch's and would not see what that calls."""
    top = _get_current_function_mode()
    if top is None or (type(top) is _AtWork and top.thread == get_ident()):
        return top
    others = (mode for mode in _get_current_function_mode_stack() if type(mode) is _AtWork)
    return next((mode for mode in others if mode.thread == get_ident()), None)


def _ended(service: Service, out: Any) -> Any:
    """``out``, where the call that returned it has ended."""
    if isinstance(out, Tensor | tuple):
        return out
    if not (inspect.isgenerator(out) or inspect.isasyncgen(out) or inspect.isawaitable(out)):
        return out
    if inspect.iscoroutine(out):
        out.close()  # else it warns that nobody awaited it
    raise NotImplementedError(
        f"{named(service.name)}: a forward that returns what it computed was wanted, got one that returns "
        f"{type(out).__name__}: nobody would see what attends in it later"
    )
