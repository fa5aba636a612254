"""ring_attention: the attention, and the gradients, that one device would give, over a sequence split across ranks.

Each hop attends to the KV blocks that have arrived while the next are under way; the parts are merged by their lse. In
the backward K and V come round again, each hop's gradients follow from the rows' final lse alone, and the sums for
blocks that came from elsewhere go back along the plan (Ring Attention, 2310.01889).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raybsa.comm import Communicator, Pending, Phase
from raybsa.gradients.catalog import build
from raybsa.gradients.codec import Codec, Payload
from raybsa.gradients.state import State
from raybsa.gradients.wire import pack as join
from raybsa.gradients.wire import unpack as split
from raybsa.kernels.api import run_call
from raybsa.kernels.backward import attention_backward
from raybsa.kernels.call import AttentionCall, cast_inputs, compute_dtype
from raybsa.kernels.delta import fast_delta
from raybsa.kernels.merge import merge_rows
from raybsa.kernels.ordinary import check_numbers_at_hand
from raybsa.kernels.seed import seed_for
from raybsa.kernels.widths import one_width
from raybsa.ring.agreement import problem_with, signature
from raybsa.ring.plan import Hop, RankPlan, RingPlan, hops_ahead
from raybsa.ring.wire import add_packed, as_blocks, as_tokens, pack, unpack, wire_shape


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RingPlan,
    communicator: Communicator,
    *,
    scale: float | None = None,
    segment_ids: Tensor | None = None,
    block_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    gradient_codec: Codec | None = None,
    gradient_states: dict[int, State] | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``block_sparse_attention`` of the whole sequence; every rank gives its tokens and gets its rows.

    Args:
        q: (B, H, S, D) this rank's tokens, in the order of ``plan.partition.tokens(rank)``.
        k, v: (B, Hkv, S, D) the same tokens'; v may be of another width Dv.
        plan: made from the whole layout, the same on every rank.
        communicator: of ``plan.world_size`` ranks.
        scale: factor on the scores; None means ``1 / sqrt(D)``.
        segment_ids: (B, S) int, this rank's tokens'; tokens of different segments do not see each other.
        block_bias: (nnz,) for the blocks of ``plan.of_rank(rank).layout``; differentiable.
        dropout_p: share of the attention weights to drop, in [0, 1).
        seed: what dropout is drawn from, the same on every rank; needed with ``dropout_p``.
        deterministic: as in ``block_sparse_attention``.
        return_lse: also return lse (B, H, S), differentiable.
        gradient_codec: how partial sums of dK and dV travel: a codec of ``raybsa.gradients``; None sends them as they
            are summed, in the compute dtype (float32, or float64 for float64 inputs).
        gradient_states: what a lossy codec remembers, by hop; kept by the caller, one dict a plan and layer. None: no
            error feedback.
        backend: of the forward, as in ``block_sparse_attention``.

    Returns:
        out (B, H, S, Dv) in q's dtype, or (out, lse).

    Raises:
        ValueError, TypeError: arguments that do not fit together, on every rank where ranks disagree.
    """
    q, k, v = cast_inputs(q, k, v)
    check_numbers_at_hand("a ring", q, k, v)
    scale, width = 1.0 / math.sqrt(q.shape[-1] or 1) if scale is None else float(scale), v.shape[-1]
    q, k, v = one_width(q, k, v)
    codec = gradient_codec or build("none")
    problem = problem_with(q, k, v, plan, communicator, block_bias, dropout_p, seed)
    communicator.agree("the ring's call", problem or signature(q, k, plan, scale, segment_ids, dropout_p, seed, codec))
    if problem is not None:
        raise ValueError(problem)
    ring = Ring(
        plan,
        communicator,
        tuple(k.shape),
        k.element_size(),
        scale,
        None if segment_ids is None else all_segments(segment_ids, plan, communicator),
        segment_ids,
        float(dropout_p),
        seed_for(seed, q.device) if dropout_p else None,
        torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        codec,
        {} if gradient_states is None else gradient_states,
        backend,
    )
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _RingAttention.apply(q, k, v, block_bias, segment_ids, ring)
    out = out if out.shape[-1] == width else out[..., :width]
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Ring:
    """What stays the same over one call: the plan, who to talk to, and the arguments that are not differentiable."""

    plan: RingPlan
    communicator: Communicator
    kv_shape: tuple[int, ...]
    itemsize: int
    scale: float
    all_segments: Tensor | None
    own_segments: Tensor | None
    dropout_p: float
    seed: Tensor | None
    deterministic: bool
    codec: Codec
    states: dict[int, State]
    backend: str

    @property
    def mine(self) -> RankPlan:
        return self.plan.of_rank(self.communicator.rank)

    @cached_property
    def ahead(self) -> int:
        """How many hops are under way beside the one at hand."""
        _, kv_heads, _, head_dim = self.kv_shape
        return hops_ahead(self.plan.largest_buffer(kv_heads, head_dim, self.itemsize, self.kv_shape[0]))

    def arriving(self, k: Tensor, v: Tensor) -> Iterator[tuple[Hop, Tensor, Tensor]]:
        """Each hop with its K and V (B, Hkv, tokens, D): the own at once, the others as they come, the next ``ahead``
        of them always under way."""
        size = self.plan.layout.kv_block_size
        first, *others = self.mine.hops
        keys, values = (as_blocks(x.contiguous() if others else x, size) for x in (k, v))
        started = (self._start(hop, keys, values) for hop in others)
        under_way = deque(islice(started, self.ahead))
        yield first, k, v
        for hop in others:
            pending, received = under_way.popleft()
            under_way.extend(islice(started, 1))
            pending.wait()
            came = unpack(received, keys, hop.receive, len(hop.kv_blocks), self.plan.kv_groups)
            yield hop, as_tokens(came[0], hop.layout.kv_tokens), as_tokens(came[1], hop.layout.kv_tokens)

    def _start(self, hop: Hop, keys: Tensor, values: Tensor) -> tuple[Pending, Tensor]:
        groups = self.plan.kv_groups
        received = keys.new_empty(wire_shape(keys, len(hop.receive), groups))
        sends = {hop.target: pack(keys, values, hop.send, groups)} if len(hop.send) else {}
        receives = {hop.source: received} if len(hop.receive) else {}
        return self.communicator.exchange("kv", sends, receives, hop=hop.shift), received

    def start_return(self, hop: Hop, grad_k: Tensor, grad_v: Tensor, own: Tensor) -> tuple[Pending, Tensor, Payload]:
        """Sends a hop's dK and dV (B, Hkv, tokens, D) to the rank that owns the blocks; gets those of own blocks."""
        groups, size = self.plan.kv_groups, self.plan.layout.kv_block_size
        like = payload_like(self.codec, wire_shape(own, len(hop.send), groups), own.dtype)
        received = own.new_empty(self.codec.nbytes(like), dtype=torch.uint8)
        sends = {}
        if len(hop.receive):
            sums = pack(as_blocks(grad_k, size), as_blocks(grad_v, size), hop.receive, groups)
            state = self.states.setdefault(hop.shift, State(hop.shift, self.communicator.rank))
            sends[hop.source] = join([self.codec.compress(sums, state)])
        receives = {hop.target: received} if len(hop.send) else {}
        return self.communicator.exchange("kv_gradient", sends, receives, hop=hop.shift), received, like

    def segments(self, hop: Hop) -> tuple[Tensor, Tensor] | None:
        """(B, rows) and (B, keys): the segments of a hop's queries and keys."""
        if self.own_segments is None or self.all_segments is None:
            return None
        layout = hop.layout
        keys = (layout.kv_block_starts[:, None] + torch.arange(layout.kv_block_size, device=layout.device)).view(-1)
        return rows_of(self.own_segments, hop, 1), self.all_segments[:, keys[keys < layout.kv_len]]

    def call(self, hop: Hop, q: Tensor, k: Tensor, v: Tensor, block_bias: Tensor | None) -> AttentionCall:
        """The attention of a hop's query rows over its keys."""
        bias = None if block_bias is None else block_bias[hop.bias_index]
        return AttentionCall(
            q, k, v, hop.layout, self.scale, None, self.segments(hop), bias, self.dropout_p, self.seed,
            self.deterministic, True,
        )  # fmt: skip


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, block_bias: Tensor | None, segment_ids: Tensor | None, ring: Ring
    ) -> Any:
        parts = _Merged(q, ring.mine.hops)
        for hop, keys, values in ring.arriving(k, v):
            if not len(hop.q_blocks):
                continue
            with ring.communicator.phase(Phase.FORWARD, "attention", hop.shift):
                call = ring.call(hop, rows_of(q, hop, 2), keys, values, block_bias)
                parts.add(hop, *run_call(call, ring.backend))
        out, lse = parts.whole
        out = out.to(q.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, block_bias, out, lse, segment_ids)  # the last so that writes to it are told
        ctx.ring = ring
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, _ = ctx.saved_tensors  # read once: under checkpointing they are made anew
        with torch.autocast(saved[0].device.type, enabled=False):
            of_q, of_k, of_v, of_bias = _backward(ctx.ring, saved, grad_out, grad_lse)
        return of_q, of_k, of_v, of_bias, None, None


def _backward(
    ring: Ring, saved: Sequence[Tensor], grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, block_bias, out, lse = saved
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    delta = fast_delta(out, grad_out, grad_lse)
    grads = _Gradients(ring, q, k, v, block_bias)
    for hop, keys, values in ring.arriving(k, v):
        if len(hop.q_blocks):
            with ring.communicator.phase(Phase.BACKWARD, "attention", hop.shift):
                call = ring.call(hop, rows_of(q, hop, 2), keys, values, block_bias)
                of_rows = (rows_of(x, hop, 2) for x in (lse, delta, grad_out))
                parts = attention_backward(call, *of_rows)
        else:
            parts = (q[:, :, :0], keys, values, None)
        grads.add(hop, *parts)
    return grads.finish()


class _Merged:
    """out (B, H, S, D) and lse (B, H, S) of the keys seen so far. The first hop's are taken as they are where they are
    all rows'; what is merged is of the compute dtype, until the last hop has come."""

    def __init__(self, q: Tensor, hops: Sequence[Hop]) -> None:
        self._q, self._dtype = q, compute_dtype(q.dtype)
        self._last = next((hop for hop in reversed(hops) if len(hop.q_blocks)), None)
        self._parts: tuple[Tensor, Tensor] | None = None

    @property
    def whole(self) -> tuple[Tensor, Tensor]:
        if self._parts is None:
            nothing = self._q.new_full(self._q.shape[:-1], -math.inf, dtype=self._dtype)
            self._parts = torch.zeros_like(self._q, dtype=self._dtype), nothing
        return self._parts

    def add(self, hop: Hop, out: Tensor, lse: Tensor) -> None:
        """Merges a hop's part, of its rows."""
        if self._parts is None and hop.rows is None:
            self._parts = out, lse
        else:
            dtype = self._q.dtype if hop is self._last else self._dtype
            self._parts = merge_rows(*self.whole, out, lse, hop.rows, dtype)


class _Gradients:
    """Sums of the gradients in the compute dtype, each the first that comes where that is all rows' or keys'; returns
    of dK and dV are under way while the next hops compute."""

    def __init__(self, ring: Ring, q: Tensor, k: Tensor, v: Tensor, block_bias: Tensor | None) -> None:
        self.ring, self.like = ring, (q, k, v, block_bias)
        self._dtype, self._size = compute_dtype(q.dtype), ring.plan.layout.kv_block_size
        self._q: Tensor | None = None
        self._kv: tuple[Tensor, Tensor] | None = None
        self._bias = None if block_bias is None else torch.zeros_like(block_bias, dtype=self._dtype)
        self._under_way: deque[tuple[Hop, Pending, Tensor, Payload]] = deque()

    @property
    def q(self) -> Tensor:
        if self._q is None:
            self._q = torch.zeros_like(self.like[0], dtype=self._dtype)
        return self._q

    @property
    def kv(self) -> tuple[Tensor, Tensor]:
        """dK and dV by blocks."""
        if self._kv is None:
            _, k, v, _ = self.like
            of_k, of_v = (as_blocks(x.new_zeros(x.shape, dtype=self._dtype), self._size) for x in (k, v))
            self._kv = of_k, of_v
        return self._kv

    def add(self, hop: Hop, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, grad_bias: Tensor | None) -> None:
        if hop.rows is None:
            self._q = grad_q if self._q is None else self._q.add_(grad_q)
        elif len(hop.q_blocks):
            self.q.index_add_(2, hop.rows, grad_q)
        if self._bias is not None and grad_bias is not None:
            self._bias.index_add_(0, hop.bias_index, grad_bias)
        if hop.shift:
            self._under_way.append((hop, *self.ring.start_return(hop, grad_k, grad_v, self.kv[0])))
            self._receive(self.ring.ahead)
        elif len(hop.q_blocks):  # the first of all hops: its keys are the rank's own
            of_k, of_v = (as_blocks(x.contiguous(), self._size) for x in (grad_k, grad_v))
            self._kv = of_k, of_v

    def _receive(self, leave: int) -> None:
        """Waits for the oldest returns until ``leave`` are under way; they are added in the order of the hops."""
        while len(self._under_way) > leave:
            hop, pending, received, like = self._under_way.popleft()
            pending.wait()
            if len(hop.send):
                sums = self.ring.codec.decode(split(received, [like])[0])
                add_packed(*self.kv, sums, hop.send, self.ring.plan.kv_groups)

    def finish(self) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, block_bias in their dtypes."""
        self._receive(0)
        grad_k, grad_v = (as_tokens(x, self.q.shape[2]) for x in self.kv)
        sums = (self.q, grad_k, grad_v, self._bias)
        return tuple(None if x is None or t is None else x.to(t.dtype) for x, t in zip(sums, self.like, strict=True))


@lru_cache(maxsize=256)
def payload_like(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> Payload:
    """Shapes and dtypes of what travels of a tensor of ``shape``; no memory."""
    payload = codec.compress(torch.zeros(shape, dtype=dtype), State())
    return replace(payload, tensors=tuple(x.to("meta") for x in payload.tensors))


def rows_of(x: Tensor, hop: Hop, dim: int) -> Tensor:
    """The tokens of a hop's query blocks, from a rank's tokens in ``dim``."""
    return x if hop.rows is None else x.index_select(dim, hop.rows)


def all_segments(own: Tensor, plan: RingPlan, communicator: Communicator) -> Tensor:
    """(B, seq_len) in global order, from every rank's (B, S)."""
    longest = max(plan.partition.lengths)
    padded = torch.nn.functional.pad(own.long(), (0, longest - own.shape[1]))
    parts = communicator.all_gather("segment_ids", padded)
    return plan.partition.join([x[:, :n] for x, n in zip(parts, plan.partition.lengths, strict=True)], 1)
