"""LayoutCache: the few layouts, or shapes of layouts, that a module uses again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

from raybsa.aside import aside

Made = TypeVar("Made")


class LayoutCache(Generic[Made]):
    """The ``maxsize`` most recently used layouts.

    Threads may share it (``nn.DataParallel`` runs one a GPU): a layout is built once, while others wait. A copy or a
    pickle of the cache is empty.
    """

    def __init__(self, maxsize: int = 16) -> None:
        if maxsize < 1:
            raise ValueError(f"maxsize must be positive, got {maxsize}")
        self.maxsize = maxsize
        self._layouts: OrderedDict[Hashable, Made] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._layouts)

    def __reduce__(self) -> tuple[type[LayoutCache], tuple[int]]:
        return type(self), (self.maxsize,)

    def get(self, key: Hashable, build: Callable[[], Made]) -> Made:
        """The layout of ``key``; ``build()`` makes it where it is not at hand. An error of ``build`` keeps nothing."""
        with self._lock:
            if key not in self._layouts:
                with aside():
                    self._layouts[key] = build()
                if len(self._layouts) > self.maxsize:
                    self._layouts.popitem(last=False)
            self._layouts.move_to_end(key)
            return self._layouts[key]
