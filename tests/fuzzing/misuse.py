"""Calls whose arguments do not fit together, one way a name: each must be refused as a ValueError or a TypeError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from raybsa import BlockLayout

Arguments = dict[str, Any]


def _narrow_keys(tensors: Arguments, options: Arguments) -> None:
    tensors["k"] = torch.nn.functional.pad(tensors["k"], (0, 1))


def _fewer_values(tensors: Arguments, options: Arguments) -> None:
    tensors["v"] = torch.nn.functional.pad(tensors["v"], (0, 0, 0, 1))


def _odd_heads(tensors: Arguments, options: Arguments) -> None:
    heads = tensors["q"].shape[1] + 1
    tensors |= {name: tensors[name][:, :1].expand(-1, heads, -1, -1) for name in "kv"}


def _other_batch(tensors: Arguments, options: Arguments) -> None:
    tensors |= {name: torch.cat([tensors[name]] * 2) for name in "kv"}


def _other_type(tensors: Arguments, options: Arguments) -> None:
    tensors["k"] = tensors["k"].to(torch.float32 if tensors["q"].dtype == torch.float64 else torch.float64)


def _whole_numbers(tensors: Arguments, options: Arguments) -> None:
    tensors |= {name: tensors[name].detach().to(torch.int32) for name in "qkv"}


def _three_dims(tensors: Arguments, options: Arguments) -> None:
    tensors["q"] = tensors["q"][0]


def _long_mask(tensors: Arguments, options: Arguments) -> None:
    q, k = tensors["q"], tensors["k"]
    options["attn_mask"] = torch.ones(q.shape[2] + 2, k.shape[2] + 2, dtype=torch.bool, device=q.device)


def _mask_of_counts(tensors: Arguments, options: Arguments) -> None:
    options["attn_mask"] = torch.ones((), dtype=torch.int64, device=tensors["q"].device)


def _ids_of_floats(tensors: Arguments, options: Arguments) -> None:
    q, k = tensors["q"], tensors["k"]
    options["segment_ids"] = tuple(torch.zeros(x.shape[0], x.shape[2], device=x.device) for x in (q, k))


def _long_ids(tensors: Arguments, options: Arguments) -> None:
    q, k = tensors["q"], tensors["k"]
    ids = (torch.zeros(x.shape[0], x.shape[2] + 1, dtype=torch.int64, device=x.device) for x in (q, k))
    options["segment_ids"] = tuple(ids)


def _one_ids(tensors: Arguments, options: Arguments) -> None:
    q = tensors["q"]
    options["segment_ids"] = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device)


def _long_bias(tensors: Arguments, options: Arguments) -> None:
    options["block_bias"] = torch.zeros(tensors["layout"].nnz_blocks + 1, device=tensors["q"].device)


def _bias_of_counts(tensors: Arguments, options: Arguments) -> None:
    count = tensors["layout"].nnz_blocks
    options["block_bias"] = torch.zeros(count, dtype=torch.int64, device=tensors["q"].device)


def _layout_of_other_lengths(tensors: Arguments, options: Arguments) -> None:
    q_len, kv_len = tensors["q"].shape[2] + 3, tensors["k"].shape[2] + 3
    rows, columns = (-(-n // 16) for n in (q_len, kv_len))
    blocks = torch.ones(rows, columns, dtype=torch.bool, device=tensors["q"].device)
    tensors["layout"] = BlockLayout.from_dense(blocks, q_len=q_len, kv_len=kv_len, q_block_size=16)


def _no_layout(tensors: Arguments, options: Arguments) -> None:
    tensors["layout"] = None


def _all_dropped(tensors: Arguments, options: Arguments) -> None:
    options["dropout_p"] = 1.0


def _scale_of_a_tensor(tensors: Arguments, options: Arguments) -> None:
    options["scale"] = torch.ones(())


def _unknown_backend(tensors: Arguments, options: Arguments) -> None:
    options["backend"] = "fastest"


MISUSES: dict[str, Callable[[Arguments, Arguments], None]] = {
    "narrow_keys": _narrow_keys,
    "fewer_values": _fewer_values,
    "odd_heads": _odd_heads,
    "other_batch": _other_batch,
    "other_type": _other_type,
    "whole_numbers": _whole_numbers,
    "three_dims": _three_dims,
    "long_mask": _long_mask,
    "mask_of_counts": _mask_of_counts,
    "ids_of_floats": _ids_of_floats,
    "long_ids": _long_ids,
    "one_ids": _one_ids,
    "long_bias": _long_bias,
    "bias_of_counts": _bias_of_counts,
    "layout_of_other_lengths": _layout_of_other_lengths,
    "no_layout": _no_layout,
    "all_dropped": _all_dropped,
    "scale_of_a_tensor": _scale_of_a_tensor,
    "unknown_backend": _unknown_backend,
}
