"""Models of transformers that do not ask: found where a model is made with our name or set to it, and refused.

A family may take ``attn_implementation`` and not ask for the attention of that name: it would attend to everything, or
lose its causal mask, which is made for that name. Nothing of transformers tells; the source of its layers does.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from threading import Lock
from typing import Any

from torch import nn

from raybsa.variants.by_hand import INTERFACE, asks, attends_by_hand

_NAMES: set[str] = set()  # implementations that were registered by us
_WATCHING = Lock()
_PLACE = "_raybsa_place"  # of an attention module: its name in the model, for messages
_WRITES_ATTENTION = re.compile(r"^class \w*Attention\w*\(nn\.Module\):", re.MULTILINE)
_OWN_TABLE = re.compile(r"_CLASSES\[\s*\w*\.?config\._attn_implementation")
_CROSS = re.compile(r"cross|enc_?dec|encoder_attn|encoder_attention", re.IGNORECASE)


def watch_models(name: str) -> None:
    """From now on a model that is to attend as ``name`` says is refused where a layer would not.

    Three methods of transformers' ``PreTrainedModel`` look first; for other names they are what they were.
    """
    from transformers import PreTrainedModel

    _NAMES.add(name)
    with _WATCHING:
        if getattr(PreTrainedModel, "_raybsa_watches", False):
            return
        cls: Any = PreTrainedModel
        cls.get_correct_attn_implementation = _checking_choice(cls.get_correct_attn_implementation)
        cls.set_attn_implementation = _checking_change(cls.set_attn_implementation)
        cls.post_init = _checking_made(cls.post_init)
        cls._raybsa_watches = True


def check_layers(model: nn.Module) -> None:
    """Raises NotImplementedError where a layer that is to attend by a name of ours does not ask for it."""
    for place, module in _ours(model):
        cls: Any = type(module)
        found = attends_by_hand(cls)
        if found is not None:
            raise _refusal(type(model), f"its {place} ({cls.__name__}) attends by itself, by {found}")
        if asks(cls):
            setattr(module, _PLACE, place)


def place_of(module: nn.Module) -> str:
    """An attention module's name in its model, as far as it is known, and its class."""
    place = getattr(module, _PLACE, None)
    name = type(module).__name__
    return name if place is None else f"{place} ({name})"


def is_cross(module: nn.Module) -> bool:
    """Whether an attention module is, by its name, between two sequences."""
    place = getattr(module, _PLACE, "").rsplit(".", 1)[-1]
    return bool(_CROSS.search(place) or _CROSS.search(type(module).__name__))


# ---- for ourselves ---------------------------------------------------------------------------------------------------


def _checking_choice(choose: Callable[..., str]) -> Callable[..., str]:
    @wraps(choose)
    def checked(self: Any, requested: str | None, is_init_check: bool = False) -> str:
        chosen = choose(self, requested, is_init_check)
        if chosen in _NAMES:
            cls: Any = type(self)
            _check_family(cls)
        return chosen

    return checked


def _checking_made(finish: Callable[..., None]) -> Callable[..., None]:
    @wraps(finish)
    def checked(self: Any) -> None:
        finish(self)
        if self.config._attn_implementation in _NAMES:
            check_layers(self)

    return checked


def _checking_change(change: Callable[..., None]) -> Callable[..., None]:
    @wraps(change)
    def checked(self: Any, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        models = [module for module in self.modules() if hasattr(module, "_can_set_attn_implementation")]
        before = [(model.config, model.config._attn_implementation) for model in models]
        try:
            change(self, attn_implementation, *args, **kwargs)
            _check_changed(models, attn_implementation)
            check_layers(self)
        except NotImplementedError:
            for config, name in before:
                config._attn_implementation_internal = name
            raise

    return checked


def _check_changed(models: list[Any], asked: str | dict[str, Any]) -> None:
    """transformers leaves a model as it was, and logs a warning, where its family cannot be told."""
    if isinstance(asked, str) and asked in _NAMES:
        for model in models:
            if model.config._attn_implementation != asked:
                raise _refusal(type(model), "it does not ask transformers' attention interface")


@lru_cache(maxsize=1024)
def _check_family(cls: Any) -> None:
    """Raises NotImplementedError where the file of a model's class shows that its layers do not ask."""
    module = sys.modules.get(cls.__module__)
    try:
        source = "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):
        return  # written at a prompt: its layers are looked at once they are there
    if _WRITES_ATTENTION.search(source) and f"{INTERFACE}(" not in source:
        raise _refusal(cls, "its layers do not ask transformers' attention interface, but attend by themselves")
    if _OWN_TABLE.search(source):
        raise _refusal(cls, "its layers look the name up in a table of their own, not in transformers' interface")


def _ours(module: nn.Module, place: str = "", ours: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are to attend by a name of ours, with their places: as their own or the nearest config says."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    ours = name in _NAMES if isinstance(name, str) else ours
    if ours:
        yield place, module
    for child, inner in module._modules.items():
        if inner is not None:
            yield from _ours(inner, f"{place}.{child}" if place else child, ours)


def _refusal(model: type[nn.Module], why: str) -> NotImplementedError:
    return NotImplementedError(
        f"{model.__name__}: a model whose attention raybsa can serve was wanted, got one that would stay dense or lose "
        f"its mask, as {why}. Load it with attn_implementation='eager'; of a model of several "
        "a dict serves the others ({'text_config': 'raybsa', 'vision_config': 'eager'})"
    )
