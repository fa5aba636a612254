"""Nested tensors, as ``nn.TransformerEncoder`` makes them of padded input in eval: padded on the way in, and back."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def pad(nested: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, E) padded with zeros to the longest sequence, and (B, L) bool: True where a token is padding."""
    lengths = torch.tensor([len(sequence) for sequence in nested.unbind()], device=nested.device)
    padded = nested.to_padded_tensor(0.0)
    warnings.warn(
        f"a nested input has no padded length: its layout is made for the longest sequence, {padded.shape[1]} tokens; "
        "build nn.TransformerEncoder with enable_nested_tensor=False to keep the padded length",
        stacklevel=3,
    )
    return padded, torch.arange(padded.shape[1], device=nested.device) >= lengths[:, None]


def unpad(out: Tensor, padding: Tensor) -> Tensor:
    """The nested tensor of (B, L, E) without its padded tokens."""
    lengths = (~padding).sum(1).tolist()
    return torch.nested.as_nested_tensor([row[:length] for row, length in zip(out, lengths, strict=True)])
