"""A problem: a call of the product and of the oracle over the same tensors. The subject ``function``, and ``base``."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import torch
from torch import Tensor

from raybsa import BlockSparseBase, block_sparse_attention
from tests.fuzzing import inputs, layouts, oracle
from tests.fuzzing.case import Case
from tests.fuzzing.given import Results
from tests.fuzzing.misuse import MISUSES


class Problem:
    """``call(*xs)`` and ``oracle(*xs)`` give the same outputs of the tensors ``xs``, whose names are ``names``.

    The oracle takes them in any floating type, and computes in it.
    """

    outputs: tuple[str, ...] = ("out", "lse")

    def __init__(self, case: Case) -> None:
        self.case = case
        self.layout = layouts.layout(case)
        given = inputs.tensors(case, self.layout)
        ids = inputs.segment_ids(case)
        if ids is not None:
            given |= {"sq": ids[0], "sk": ids[1]}
        self.names, self.tensors = tuple(given), tuple(given.values())
        self.seen = layouts.seen(case, self.layout)
        if case.transform == "pickled":
            self.layout = pickle.loads(pickle.dumps(self.layout))
        self.module = self._module()

    def _module(self) -> torch.nn.Module | None:
        case = self.case
        if case.subject != "base":
            return None
        options = {"density": case.density, "block_size": case.q_block, "causal": case.causal, "scale": case.scale}
        options |= {"dropout": case.dropout}
        module = BlockSparseBase(pattern=layouts.rule(case), backend=case.backend, **options)
        return copy.deepcopy(module) if case.transform == "deepcopy" else module

    def call(self, *xs: Tensor) -> tuple[Tensor, ...]:
        given, case = dict(zip(self.names, xs, strict=True)), self.case
        ids = (given["sq"], given["sk"]) if "sq" in given else None
        q, k, v = self._qkv(given)
        if self.module is not None:
            return (self.module(q, k, v, attn_mask=given.get("m"), segment_ids=ids),)
        options = {"attn_mask": given.get("m"), "segment_ids": ids, "block_bias": given.get("b"), **self.options}
        tensors = {"q": q, "k": k, "v": v, "layout": self.layout}
        if case.misuse:
            MISUSES[case.misuse](tensors, options)
        found = block_sparse_attention(**tensors, **options)
        return found if case.return_lse else (found,)

    def _qkv(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        k = given.get("k", given["q"])
        return given["q"], k, given.get("v", k)

    @property
    def options(self) -> dict[str, Any]:
        case = self.case
        return {
            "scale": case.scale,
            "dropout_p": case.dropout,
            "seed": case.seed if case.dropout and not case.seedless else None,
            "deterministic": case.deterministic or None,
            "return_lse": case.return_lse,
            "backend": case.backend,
        }

    def oracle(self, *xs: Tensor) -> tuple[Tensor, ...]:
        given, case = dict(zip(self.names, xs, strict=True)), self.case
        q, k, v = self._qkv(given)
        mask, seen, added = given.get("m"), self.seen, None
        if mask is not None and mask.dtype == torch.bool:
            seen = seen & mask
        elif mask is not None:
            added = mask.to(q.dtype).expand(seen.shape)
        if "sq" in given:
            seen = seen & (given["sq"][:, None, :, None] == given["sk"][:, None, None, :])
        if "b" in given:
            bias = layouts.bias_of_tokens(case, self.layout, given["b"])
            added = bias if added is None else added + bias
        shape = (case.batch, case.heads, case.q_len, case.kv_len)
        factor = oracle.dropped(case.seed, case.dropout, shape, q.device).to(q.dtype) if case.dropout else None
        scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
        out, lse, _ = oracle.attend(q, k, v, seen, scale=scale, added=added, factor=factor)
        return (out, lse) if case.return_lse else (out,)

    def beside(self, wanted: Results) -> Results:
        """Results of other ways to the same, by the name of what they must equal."""
        return {}

    def warm(self) -> None:
        """Another call over the same layout, so that what is kept with it is of that one."""
        if self.module is not None or not all(x.numel() for x in self.tensors[:3]):
            return
        given = dict(zip(self.names, self.tensors, strict=True))
        xs = [x.detach().clone().requires_grad_() for x in self._qkv(given)]
        out, lse = block_sparse_attention(*xs, self.layout, return_lse=True, scale=0.7)
        (out.sum() + lse.clamp(min=0).sum()).backward()
