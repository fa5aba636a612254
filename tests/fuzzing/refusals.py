"""What the product refuses in words, and for which cases. Any other refusal is a fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from tests.fuzzing.case import Case

OTHERS = ("flex", "fa4", "cudnn")


class Refusal(NamedTuple):
    """An error whose type and words are known, of the cases for which ``when`` holds."""

    kind: str
    words: str
    when: Callable[[Case], bool]


def _own(case: Case) -> bool:
    """Whether the backend is of the user's own, or of another library."""
    return case.backend in OTHERS or ":" in case.backend


def _by_cpp(case: Case) -> bool:
    return case.backend == "cpp"


def _not_float32(case: Case) -> bool:
    return _by_cpp(case) and (case.dtype != "float32" or case.transform == "autocast")


def _odd_width(case: Case) -> bool:
    return _by_cpp(case) and bool(max(case.head_dim, case.v_dim) % 16)


def _by_others(case: Case) -> bool:
    return _own(case) or (case.backend == "triton" and "m" in case.grad_of)


def _without_numbers(case: Case) -> bool:
    return case.backend == "reference" and case.transform in ("fake", "meta")


def _exported_by_others(case: Case) -> bool:
    return case.transform == "export" and (case.backend == "reference" or _own(case))


def _needs_its_layout(case: Case) -> bool:
    """Whether a multihead's call ends a graph."""
    return case.subject == "multihead" and any(case.has(x) for x in ("weights", "bias_kv", "zero_attn"))


NOT, RUN = "NotImplementedError", "RuntimeError"
KNOWN = (
    Refusal(
        NOT,
        "C\\+\\+ kernels take float32",
        _not_float32,
    ),
    Refusal(
        NOT,
        "C\\+\\+ kernels take a head_dim that is a mult",
        _odd_width,
    ),
    Refusal(NOT, "C\\+\\+ kernels take no (attn_mask|segment_ids|block_bias|dropout)", _by_cpp),
    Refusal(NOT, "needs a C\\+\\+ compiler", lambda c: c.backend in ("cpp", "flex")),
    Refusal(NOT, "makes no gradient of attn_mask", lambda c: c.backend in ("cpp", "triton") and "m" in c.grad_of),
    Refusal(NOT, "make no gradient of attn_mask", lambda c: c.backend == "triton" and "m" in c.grad_of),
    Refusal(NOT, "backend 'flex' cannot serve this call", lambda c: c.backend == "flex"),
    Refusal(NOT, "backend 'fa4' cannot serve this call", lambda c: c.backend == "fa4"),
    Refusal(NOT, "backend 'cudnn' cannot serve this call", lambda c: c.backend == "cudnn"),
    Refusal(NOT, "Triton kernels take float16, bf", lambda c: c.backend == "triton" and c.dtype == "float64"),
    Refusal(
        NOT,
        "serves ordinary tensors, outside of torch.func",
        _by_others,
    ),
    Refusal(NOT, "tensors with numbers were wanted", _without_numbers),
    Refusal(NOT, "tensors spread over a mesh take no dropout", lambda c: c.transform == "dtensor" and c.dropout > 0),
    Refusal(NOT, "an exported program holds attention by", _exported_by_others),
    Refusal("Unsupported", "Observed exception", _exported_by_others),
    Refusal("Unsupported", "marked as skipped", lambda c: c.transform == "export" and _needs_its_layout(c)),
    Refusal(RUN, "more than one element of the written-to", lambda c: c.transform == "jvp" and c.strides == "expanded"),
    Refusal("ValueError", "no size may be 0", lambda c: not c.v_dim),
)


def is_known(case: Case, error: BaseException) -> bool:
    """Whether an error is a refusal of the list."""
    kind, words = type(error).__name__, str(error)
    return any(x.kind == kind and re.search(x.words, words) and x.when(case) for x in KNOWN)
