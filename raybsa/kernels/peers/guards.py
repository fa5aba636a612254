"""What the adapters of other libraries refuse alike: missing packages, other GPUs, features that none of them has."""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from raybsa.kernels.call import ALIGNMENT, AttentionCall

HOPPER = (9, 0)


@cache
def installed(package: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def why_not_installed(package: str, oldest: str) -> str | None:
    """Why ``package`` cannot be used: it is missing, or older than what the adapter was checked with."""
    found = installed(package)
    if found is None:
        return f"{package} is not installed (pip install '{package}>={oldest}', or 'raybsa[peers]')"
    if _order(found) < _order(oldest):
        return f"{package} {found} is too old (pip install '{package}>={oldest}')"
    return None


def why_not_hopper(device: torch.device, name: str) -> str | None:
    """These kernels were checked on compute capability 9.0 alone."""
    if device.type != "cuda":
        return f"{name} runs on cuda, not on {device.type}"
    found = _capability(device)
    return None if found == HOPPER else f"{name} was checked on compute capability 9.0 only, this is {found}"


def why_not_plain(call: AttentionCall, name: str) -> str | None:
    """The features of a call that the block-sparse kernels of other libraries lack."""
    layout = call.layout
    if call.extra is not None:
        return f"this {name} adapter takes no {call.extra}"
    for feature, given in (
        ("causal layout", layout.causal),
        ("selected layout", layout.q_block_ids is not None or layout.kv_block_ids is not None),
        ("ragged block", layout.q_tokens % layout.q_block_size or layout.kv_tokens % layout.kv_block_size),
    ):
        if given:
            return f"this {name} adapter takes no {feature}"
    if call.deterministic and call.needs_grad:
        return f"{name} adds gradients in an order that changes from run to run"
    for tensor in (call.q, call.k, call.v):
        if tensor.stride(-1) != 1 or tensor.data_ptr() % ALIGNMENT:
            return f"{name} wants heads that are contiguous and begin at multiples of {ALIGNMENT} bytes"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _order(text: str) -> tuple[float, ...]:
    """Versions in their order: a release counts after its betas."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(?:b(\d+))?", text)
    if found is None:
        return (0.0,)
    major, minor, patch, beta = found.groups()
    return float(major), float(minor), float(patch or 0), float(beta) if beta else float("inf")
