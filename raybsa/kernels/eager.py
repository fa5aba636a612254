"""What torch.compile leaves as it is: work whose shapes depend on the data, and whose kernels are our own anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Args = ParamSpec("Args")
Result = TypeVar("Result")


def eagerly(function: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
    """The function's result. In a compiled module the graph ends before the call and another begins after it.

    ``torch.compiler.disable`` as a decorator would do the same, and import the compiler with us: as long as torch's
    own import.
    """
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*args, **kwargs)
