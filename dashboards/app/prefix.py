"""The app behind a proxy: the path that all of its addresses begin with, whether or not the proxy keeps it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

_DASHS = ("DASH_REQUESTS_PATHNAME_PREFIX", "DASH_URL_BASE_PATHNAME", "DASH_ROUTES_PATHNAME_PREFIX", "DASH_APP_NAME")
_PLAIN = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/-]*")

Wsgi = Callable[[dict[str, Any], Any], Iterable[bytes]]


def prefix_of(given: str | None) -> str:
    """``/user/ann/proxy/8050/`` of what was given, else of Dash's environment variables; ``/`` where there is nothing.

    Raises:
        ValueError: it is no path of a URL.
    """
    text = given or next((os.environ[name] for name in _DASHS if os.environ.get(name)), "")
    if not _PLAIN.fullmatch(text) or "//" in text.strip("/") or {".", ".."} & set(text.split("/")):
        raise ValueError(f"a prefix is the path of a URL, as /user/ann/proxy/8050/, got {text!r}")
    parts = "/".join(part for part in text.split("/") if part)
    return f"/{parts}/" if parts else "/"


@contextmanager
def dash_reads_none() -> Iterator[None]:
    """Meanwhile Dash does not see its variables: it takes some of them together for an error."""
    before = {name: os.environ.pop(name) for name in _DASHS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def without_prefix(path: str | None, prefix: str) -> str:
    """A path as it would be without a proxy; one that has no prefix, since a proxy took it away, is the same."""
    path = path or "/"
    if f"{path}/" == prefix:
        return "/"
    return f"/{path[len(prefix) :]}" if path.startswith(prefix) else path


class Unprefixed:
    """A WSGI application that answers the same with the prefix and without it."""

    def __init__(self, app: Wsgi, prefix: str) -> None:
        self._app, self._prefix = app, unquote(prefix, "latin-1")  # as WSGI has it

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = without_prefix(environ.get("PATH_INFO"), self._prefix)
        return self._app(environ | {"PATH_INFO": path}, start_response)
