"""The subject ``multihead``: ``BlockSparseMultihead`` beside projections and attention written out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raybsa import BlockSparseMultihead
from tests.fuzzing import inputs, layouts, oracle
from tests.fuzzing.problem import Problem

INF = float("inf")


class Multihead(Problem):
    """Inputs q, k, v (query, key and value), m and p (attn_mask and key_padding_mask, True = hidden); under
    ``functional_call`` also the parameters, as ``w.name``."""

    def _module(self) -> torch.nn.Module:
        case = self.case
        width = case.heads * case.head_dim
        self.widths = (width, width + 3 if case.has("kdim") else width, width + 5 if case.has("vdim") else width)
        torch.manual_seed(case.seed)
        module = BlockSparseMultihead(
            width,
            case.heads,
            bias=not case.has("no_bias"),
            add_bias_kv=case.has("bias_kv"),
            add_zero_attn=case.has("zero_attn"),
            kdim=self.widths[1],
            vdim=self.widths[2],
            batch_first=case.has("batch_first"),
            device=case.device,
            dtype=inputs.dtype_of(case.dtype),
            pattern=layouts.rule(case),
            density=case.density,
            block_size=case.q_block,
            causal=case.causal,
            backend=case.backend,
        )
        for parameter in module.parameters():
            parameter.requires_grad_(False).uniform_(-0.4, 0.4)
        given = self._inputs()
        if case.transform in ("functional_call", "fake"):
            given |= {f"w.{name}": x.detach() for name, x in module.named_parameters()}
        self.names, self.tensors = tuple(given), tuple(given.values())
        self.outputs = ("out", "weights") if case.has("weights") else ("out",)
        return module

    def _inputs(self) -> dict[str, Tensor]:
        case, given = self.case, {}
        dtype = inputs.dtype_of(case.dtype)
        for number, (name, length) in enumerate(zip("qkv", (case.q_len, case.kv_len, case.kv_len), strict=True)):
            shape: tuple[int, ...] = (case.batch, length) if case.has("batch_first") else (length, case.batch)
            if case.has("unbatched") and case.batch == 1:
                shape = (length,)
            given[name] = inputs.normal(case, (*shape, self.widths[number]), number).to(case.device, dtype)
        if self._is_self():
            given = {"q": given["q"]}
        shape = (case.q_len, case.kv_len)
        if case.has("mask_3d"):
            shape = (case.batch * case.heads, *shape)
        if case.mask != "none":
            given["m"] = self._mask(shape, case.mask, 5)
        if case.has("padding") or case.has("float_padding"):
            kind = "bool" if case.has("padding") else "infinite"
            given["p"] = self._mask((case.batch, case.kv_len) if given["q"].dim() == 3 else (case.kv_len,), kind, 8)
        return given

    def _is_self(self) -> bool:
        case = self.case
        return not case.has("apart") and case.q_len == case.kv_len and len(set(self.widths)) == 1

    def _mask(self, shape: tuple[int, ...], kind: str, number: int) -> Tensor:
        case = self.case
        hidden = inputs.normal(case, shape, number) > 0.6
        if kind == "bool":
            return hidden.to(case.device)
        x = inputs.normal(case, shape, number + 1)
        x = x.masked_fill(hidden, -INF) if kind in ("infinite", "lowest") else x
        return x.to(case.device, inputs.dtype_of(case.dtype))

    def call(self, *xs: Tensor) -> tuple[Tensor, ...]:
        given, case = dict(zip(self.names, xs, strict=True)), self.case
        q = given["q"]
        options: dict[str, Any] = {
            "key_padding_mask": given.get("p"),
            "attn_mask": given.get("m"),
            "need_weights": case.has("weights"),
            "average_attn_weights": not case.has("each_head"),
            "is_causal": case.has("hint") and "m" in given,
        }
        every = (q, given.get("k", q), given.get("v", q))
        weights = {name.removeprefix("w."): x for name, x in given.items() if name.startswith("w.")}
        assert self.module is not None
        out, found = (
            torch.func.functional_call(self.module, weights, every, options)
            if weights
            else self.module(*every, **options)
        )
        return (out,) if found is None else (out, found)

    def oracle(self, *xs: Tensor) -> tuple[Tensor, ...]:
        given, case = dict(zip(self.names, xs, strict=True)), self.case
        assert self.module is not None
        dtype = given["q"].dtype
        weights = {name: x.detach().to(dtype) for name, x in self.module.named_parameters()}
        weights |= {name.removeprefix("w."): x for name, x in given.items() if name.startswith("w.")}
        q, k, v = self._heads(given, weights)
        seen, added = self._masks(given, dtype)
        extra = self._extra(weights, k)
        if extra is not None:
            k, v = torch.cat([k, extra[0]], 2), torch.cat([v, extra[1]], 2)
            seen = torch.cat([seen, seen.new_ones(*seen.shape[:3], extra[0].shape[2])], 3)
            added = (
                None if added is None else torch.cat([added, added.new_zeros(*added.shape[:3], extra[0].shape[2])], 3)
            )
        out, _, found = oracle.attend(q, k, v, seen, scale=1 / math.sqrt(case.head_dim), added=added)
        out = out.transpose(1, 2).flatten(2) @ weights["out_proj.weight"].T
        out = out + weights["out_proj.bias"] if "out_proj.bias" in weights else out
        found = found if case.has("each_head") else found.mean(1)
        if given["q"].dim() == 2:
            out, found = out[0], found[0]
        elif not case.has("batch_first"):
            out = out.transpose(0, 1)
        return (out, found) if case.has("weights") else (out,)

    def _heads(self, given: dict[str, Tensor], weights: dict[str, Tensor]) -> list[Tensor]:
        """(B, H, S, D) of query, key and value."""
        case, found = self.case, []
        packed = weights["in_proj_weight"].chunk(3) if "in_proj_weight" in weights else None
        biases = weights["in_proj_bias"].chunk(3) if "in_proj_bias" in weights else None
        for i, name in enumerate("qkv"):
            x = given.get(name, given["q"])
            x = x @ (weights[f"{name}_proj_weight"] if packed is None else packed[i]).T
            x = x if biases is None else x + biases[i]
            x = x[None] if x.dim() == 2 else x if case.has("batch_first") else x.transpose(0, 1)
            found.append(x.unflatten(2, (case.heads, case.head_dim)).transpose(1, 2))
        return found

    def _masks(self, given: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        case, seen = self.case, self.seen
        added = None
        for name in ("m", "p"):
            if name not in given or (name == "m" and case.has("hint") and case.causal):
                continue
            x = given[name]
            if name == "p":
                x = x.view(case.batch, 1, 1, case.kv_len)
            elif x.dim() == 3:
                x = x.view(case.batch, case.heads, case.q_len, case.kv_len)
            if x.dtype == torch.bool:
                seen = seen & ~x
            else:
                x = x.to(dtype).expand(seen.shape)
                added = x if added is None else added + x
        return seen, added

    def _extra(self, weights: dict[str, Tensor], k: Tensor) -> tuple[Tensor, Tensor] | None:
        case, keys, values = self.case, [], []
        one = (case.batch, case.heads, 1, case.head_dim)
        if case.has("bias_kv"):
            keys.append(weights["bias_k"].view(1, case.heads, 1, case.head_dim).expand(one))
            values.append(weights["bias_v"].view(1, case.heads, 1, case.head_dim).expand(one))
        if case.has("zero_attn"):
            keys.append(k.new_zeros(one))
            values.append(k.new_zeros(one))
        return (torch.cat(keys, 2), torch.cat(values, 2)) if keys else None
