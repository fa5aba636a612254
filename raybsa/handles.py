"""Handles: how operators of torch, which take only tensors and numbers, find objects of this process.

A handle is a number in a tensor: a compiled graph takes a tensor as it comes and serves any, where a plain number
would be part of it.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_NUMBERS = itertools.count()
_OWNERS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def new_handle(owner: object) -> Tensor:
    """() int64 on the CPU, a number that nothing else of this process has; it does not keep its owner alive."""
    number = next(_NUMBERS)
    _OWNERS[number] = owner
    with torch.inference_mode(False):  # else no training could take it
        return torch.tensor(number, device="cpu")


def by_handle(handle: Tensor) -> Any:
    """The living owner of a handle."""
    return _OWNERS[int(handle)]
