"""What a results folder may be called: a path of this machine, or a URI."""

from __future__ import annotations

import os
import re

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
