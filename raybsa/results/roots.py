"""What a results folder may be called, a path of this machine or a URI, and what a file after a name of its rows."""

from __future__ import annotations

import hashlib
import os
import re
from urllib.parse import quote

_LONGEST = 200  # bytes of a file's name; filesystems take 255
_ALMOST = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?!/)|(?P<known>s3|gs|gcs|abfss?|hdfs|viewfs|file):")


def is_uri(root: str) -> bool:
    """Whether it is more than a path of this machine."""
    return "://" in root


def local_path(root: str) -> str:
    """A path from the root; ``~`` is a home folder also where no shell has seen it (``--out=~/results``).

    Raises:
        ValueError: a URI with too few slashes, which would be a folder of that name.
    """
    if found := _ALMOST.match(root):
        scheme = found["scheme"] or found["known"]
        raise ValueError(f"a URI begins with {scheme}://, a folder of that name with ./, got {root!r}")
    return os.path.abspath(os.path.expanduser(root))


def one_name(text: str) -> str:
    """A name for a file or folder after any text: another one for another text, and never a path (``../x``)."""
    name = quote(text, safe="", errors="surrogatepass") or "%"
    if name.startswith("."):
        name = f"%2E{name[1:]}"
    if len(name) > _LONGEST:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"{name[:_LONGEST]}-{digest}"
    return name
