"""Which module classes write attention out by themselves: what an attention interface, or ``swap``, does not reach."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

PRODUCTS = frozenset(("matmul", "bmm", "baddbmm", "einsum", "@"))
WHOLE = frozenset(("scaled_dot_product_attention", "multi_head_attention_forward", "flex_attention"))
INTERFACE = "get_interface"  # by which a layer of transformers asks for the attention of a name
_NOT_ITS_OWN = ("torch.", "transformers.modeling_utils", "transformers.generation", "transformers.integrations")


@lru_cache(maxsize=4096)
def asks(cls: Any) -> bool:
    """Whether a method of the class asks transformers' attention interface."""
    return INTERFACE in _called(cls)


@lru_cache(maxsize=4096)
def attends_by_hand(cls: Any) -> str | None:
    """What shows that the class computes attention itself; None where nothing does.

    Read in its source: a softmax and a product in its methods or in functions of its file that they call, a call of
    torch's own attention, or that it is an ``nn.MultiheadAttention``. A class that asks the interface does not, nor a
    class of transformers with a softmax and a product whose name says nothing of attention (routers, losses).
    """
    if issubclass(cls, nn.MultiheadAttention):
        return "torch's nn.MultiheadAttention"
    called = _called(cls)
    if INTERFACE in called:
        return None
    return next(iter(sorted(called & WHOLE)), None) or _product(cls, called)


@lru_cache(maxsize=4096)
def writes_out(cls: Any) -> str | None:
    """The same, of a class named for attention that calls neither torch's attention nor an interface: ``swap`` sees
    nothing of it."""
    called = _called(cls)
    named = "att" in cls.__name__.lower() and not issubclass(cls, nn.MultiheadAttention)
    return None if INTERFACE in called or called & WHOLE or not named else _product(cls, called)


def _product(cls: Any, called: frozenset[str]) -> str | None:
    product = sorted(called & PRODUCTS)
    other = cls.__module__.startswith("transformers.") and "att" not in cls.__name__.lower()
    return f"softmax and {product[0]}" if "softmax" in called and product and not other else None


@lru_cache(maxsize=4096)
def _called(cls: Any) -> frozenset[str]:
    """Last names of all that the class's own methods call, and of what functions beside it call for them."""
    found: set[str] = set()
    for _, method in inspect.getmembers(cls, inspect.isfunction):
        if not f"{method.__module__}.".startswith(_NOT_ITS_OWN):
            found |= _called_by(inspect.unwrap(method), 0)
    return frozenset(found)


@lru_cache(maxsize=16384)
def _called_by(function: FunctionType, depth: int) -> frozenset[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()  # made at run time: it has no source
    found = set(_names(tree))
    beside = vars(sys.modules[function.__module__]) if function.__module__ in sys.modules else {}
    for name in list(found):
        other = beside.get(name)
        if depth < 2 and isinstance(other, FunctionType) and other.__module__ == function.__module__:
            found |= _called_by(other, depth + 1)
    return frozenset(found)


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield "@"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id
