"""Text on a stream of any encoding: what it cannot hold is spelled in ASCII, so that no line of progress ends a job."""

from __future__ import annotations

import codecs
import io
from typing import TextIO

_ASCII = dict(zip("·░▒▓█–×µ\u00a0", ".-+%#-xu ", strict=True)) | {"±": "+-", "≤": "<=", "→": "->", "…": "..."}
_SPELLED = "raybsa.spelled"


def printable(stream: TextIO) -> TextIO:
    """The same stream, which from now on raises for no text: ``·`` is a dot where there is none, a name of another
    encoding has escapes (``\\udce9``)."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_SPELLED)
    return stream


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end]
    return "".join(_ASCII.get(one) or one.encode("ascii", "backslashreplace").decode() for one in wanted), error.end


codecs.register_error(_SPELLED, _spelled)
