"""Finding the filesystem of a results folder, and whether it answers: pyarrow waits for a cloud 15 minutes and longer,
without a word, where credentials are missing or nobody is there."""

from __future__ import annotations

import threading
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from raybsa.results.roots import is_uri, local_path

ANSWER_SECONDS = 10.0
_GCS_SECONDS = 6  # how long its own retries may last, so that the reason is known in time
_LIMIT = "retry_limit_seconds"

Found = tuple[fs.FileSystem, str]


def filesystem_of(root: str) -> Found:
    """The filesystem of a folder, and the folder's path on it.

    Raises:
        ValueError: it is neither a path nor a URI of ``pyarrow.fs``.
        OSError: the cloud does not answer within ``ANSWER_SECONDS``, or refuses.
    """
    if not is_uri(root):
        return fs.LocalFileSystem(), local_path(root)
    answers: list[Found | Exception] = []
    asking = threading.Thread(target=lambda: answers.append(_answer(root)), daemon=True)  # nothing ends a call of its
    asking.start()
    asking.join(ANSWER_SECONDS)
    if not answers:
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s: is that its address, and are credentials set?")
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


def _answer(root: str) -> Found | Exception:
    try:
        filesystem, path = fs.FileSystem.from_uri(root)
        impatient = fs.FileSystem.from_uri(_impatient(root))[0] if filesystem.type_name == "gcs" else filesystem
        impatient.get_file_info(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        return error
    except (pa.ArrowException, OSError) as error:  # the first are Azure's
        return OSError(" ".join(str(error).split())[:300])
    return filesystem, path


def _impatient(root: str) -> str:
    """The URI with a limit for retries, where it has none."""
    parts = urlsplit(root)
    if _LIMIT in parts.query:
        return root
    return urlunsplit(parts._replace(query="&".join(filter(None, (parts.query, f"{_LIMIT}={_GCS_SECONDS}")))))
