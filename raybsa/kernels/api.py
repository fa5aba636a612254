"""block_sparse_attention: the one call; it checks the arguments and picks a backend that can serve them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from raybsa.aside import shape_of
from raybsa.kernels import auto, blocked, composite, cpp, dtensor, flex, operator, reference, transforms, triton_backend
from raybsa.kernels.backward import BACKENDS as BACKWARDS
from raybsa.kernels.backward import own_backend
from raybsa.kernels.call import AttentionCall, cast_inputs, check_call, check_numbers, decided
from raybsa.kernels.eager import eagerly
from raybsa.kernels.ordinary import forward_mode, has_numbers, is_distributed, is_ordinary, under_transforms
from raybsa.kernels.peers import cudnn, fa4
from raybsa.kernels.seed import seed_for
from raybsa.kernels.widths import in_sizes_of_kernels, is_for_kernels
from raybsa.layout import BlockLayout
from raybsa.own import own
from raybsa.patterns.written import WrittenRule

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "blocked": blocked,
    "cpp": cpp,
    "triton": triton_backend,
    "flex": flex,
    "fa4": fa4,
    "cudnn": cudnn,
}


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    block_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The true softmax attention over the kept blocks of each row, with exact gradients.

    A row with nothing to attend gives output 0, lse -inf and zero gradients. Under ``torch.autocast`` q, k and v are
    cast to its dtype, as SDPA does. Under ``torch.compile`` it is one operator, without a graph break; a named backend
    of other makers and ``reference`` do break the graph. What else of torch it serves, and what it refuses, is in
    docs/troubleshooting.md.

    Args:
        q: (B, H, Sq, D) float16, bfloat16, float32 or float64.
        k: (B, Hkv, Skv, D) with H a multiple of Hkv: query head h reads KV head ``h // (H // Hkv)``.
        v: (B, Hkv, Skv, Dv), mostly with Dv = D; where it is not, the narrower are filled up with zeros.
        layout: which KV blocks each query block attends, for Sq and Skv tokens, on q's device.
        scale: factor on the scores; None means ``1 / sqrt(D)``.
        attn_mask: broadcastable to (B, H, Sq, Skv), never expanded; bool (True = attend) or added to the scores.
        segment_ids: int tensors (B, Sq) and (B, Skv); tokens of different segments do not see each other.
        block_bias: (nnz,) added to the scores of its block, in the layout's storage order; differentiable.
        dropout_p: share of the attention weights to drop, in [0, 1); the rest is scaled by ``1 / (1 - dropout_p)``.
        seed: what dropout is drawn from (``raybsa.counter``), by global positions: an integer, of which the lower 32
            bits count. None draws one from torch's default generator of q's device, as torch's own dropout does.
        deterministic: True asks for bit-equal repeats; None follows ``torch.use_deterministic_algorithms``.
        return_lse: also return lse (B, H, Sq), natural log, float32 (float64 for float64 inputs), differentiable.
        backend: ``"auto"`` or a name in ``BACKENDS``. ``"auto"`` takes what was fastest on this GPU for such a call
            (``raybsa.kernels.auto_table``), our own kernels where nothing like it was measured. Under
            ``torch.compile`` it takes our own.

    Returns:
        out (B, H, Sq, Dv) in q's dtype, or (out, lse).

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    q, k, v = cast_inputs(q, k, v)
    rest = (scale, attn_mask, segment_ids, block_bias, dropout_p, seed, deterministic, return_lse)
    call = make_call(q, k, v, layout, *rest)
    out, lse = run_call(call, backend)
    return (out, lse) if return_lse else out


def make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    segment_ids: tuple[Tensor, Tensor] | None = None,
    block_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> AttentionCall:
    """The call that ``block_sparse_attention`` runs for these arguments, with what they leave open decided; q, k and v
    as ``cast_inputs`` gives them."""
    if scale is not None or dropout_p or segment_ids is not None:
        check_numbers(scale, dropout_p, segment_ids)
    return AttentionCall(
        q,
        k,
        v,
        layout,
        1.0 / math.sqrt(shape_of(q)[-1] or 1) if scale is None else float(scale),
        attn_mask,
        segment_ids,
        block_bias,
        float(dropout_p),
        seed_for(seed, q.device) if dropout_p else None,
        torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        return_lse,
    )


def run_call(call: AttentionCall, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """out and lse (only where the call asks for it) of a call made elsewhere; raises as ``block_sparse_attention``."""
    if torch.compiler.is_compiling() or not is_ordinary(call):
        if is_distributed(call):  # a rank's part has sizes of its own; torch's views of an empty one loop for ever
            return _run_otherwise(call, backend)
        return in_sizes_of_kernels(call, partial(_run_otherwise, backend=backend))
    chosen = _chosen(call, backend)
    if call.q.is_meta or not torch.is_autocast_enabled(call.q.device.type):
        return chosen(call)
    with torch.autocast(call.q.device.type, enabled=False):
        return chosen(call)


def _run_otherwise(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """Under a compiler, or of tensors that our kernels may not read as they are (``raybsa.kernels.ordinary``)."""
    if not torch.compiler.is_compiling():
        return _run_aside(call, backend)
    late = under_transforms() or forward_mode() or is_distributed(call) or not _is_ours(call, backend)
    if late and torch.compiler.is_exporting():
        raise NotImplementedError(
            f"an exported program holds attention by 'auto', {', '.join(map(repr, BACKWARDS))} alone, of plain tensors "
            f"outside of torch.func, got backend {backend!r} and {type(call.q).__name__}"
        )
    return eagerly(_run_late, call, backend) if late else operator.run(call, backend)


def _run_late(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """After a break of the graph: the layout of a written rule is known now."""
    layout = call.layout
    if isinstance(layout, WrittenRule):
        layout = layout.layout(call.q.shape[2], call.k.shape[2], call.q.shape[1], call.q.device)
    return run_call(replace(call, layout=layout), backend)


def _run_aside(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    if is_distributed(call):
        return dtensor.run(call, partial(run_call, backend=backend))
    if backend != "reference" and not _is_ours(call, backend):
        named_backend(backend)
        raise NotImplementedError(
            f"backend {backend!r} serves ordinary tensors, outside of torch.func, traces and dispatch modes, got "
            f"{type(call.q).__name__}: 'auto', {', '.join(map(repr, BACKWARDS))} serve more"
        )
    transformed = under_transforms() or forward_mode()
    if backend != "reference" and not transformed:
        return operator.run(call, backend)
    if not has_numbers(call.q):
        raise NotImplementedError(
            f"tensors with numbers were wanted {'under torch.func' if transformed else 'by backend reference'}, got "
            f"{type(call.q).__name__} on {call.q.device}"
        )
    check_call(call)
    with torch.autocast(call.q.device.type, enabled=False):
        if backend == "reference" or forward_mode():
            return (reference if backend == "reference" else composite).run(call)
        return transforms.run(call, _Ours(backend))


class _Ours(NamedTuple):
    """What computes under transforms, once these have unwrapped their tensors: a backend of ours, by its operator where
    a mode looks on."""

    backend: str

    def forward(self, call: AttentionCall, for_gradient: bool) -> tuple[Tensor, Tensor]:
        if not is_ordinary(call):
            return operator.run(call, self.backend)
        found: tuple[Tensor, Tensor] = own_backend(call, self.backend).forward(call, for_gradient)
        return found

    def gradients(
        self,
        call: AttentionCall,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        wanted: tuple[bool, bool],
    ) -> Sequence[Tensor | None]:
        if not is_ordinary(call):
            return operator.gradients(call, self.backend, out, lse, grad_out, grad_lse, wanted)
        module = own_backend(call, self.backend, wanted[0])
        found: Sequence[Tensor | None] = module.gradients(call, out, lse, grad_out, grad_lse, wanted)
        return found


def _is_ours(call: AttentionCall, backend: str) -> bool:
    """Whether the operator serves the call; what a backend of ours lacks is refused when it runs, but for this."""
    if backend == "triton" and call.attn_mask is not None and call.attn_mask.requires_grad:
        return False
    return operator.can_serve(backend)


def _chosen(call: AttentionCall, backend: str) -> Callable[[AttentionCall], tuple[Tensor, Tensor]]:
    """What runs a checked call; checks and choice hold for all calls of the same signature and layout."""

    def choose() -> Callable[[AttentionCall], tuple[Tensor, Tensor]]:
        if not is_for_kernels(call):
            return partial(in_sizes_of_kernels, run=partial(run_call, backend=backend))
        if call.q.is_meta:
            return partial(_run_aside, backend=backend)
        check_call(call)
        chosen = BACKENDS[choose_backend(call)] if backend == "auto" else _named(backend, call)
        run: Callable[[AttentionCall], tuple[Tensor, Tensor]] = chosen.run
        return run if call.needs_grad or chosen not in BACKWARDS.values() else chosen.forward

    found: Callable[[AttentionCall], tuple[Tensor, Tensor]] = decided(call, ("backend", backend), choose)
    return found


def choose_backend(call: AttentionCall) -> str:
    """The backend that ``auto`` takes: the first that can serve the call.

    They are asked in the order in which they were fastest on the nearest measured cell; then, and where nothing like
    the call was measured, triton and flex on CUDA, cpp on a CPU; blocked is last.
    """
    ours = ("triton", "flex") if call.q.device.type == "cuda" else ("cpp",)
    order = (*auto.measured_order(call), *ours)
    return next((name for name in order if BACKENDS[name].why_not(call) is None), "blocked")


def named_backend(name: str) -> ModuleType:
    """A backend of ``BACKENDS``, or your own ``"module:Name"``. Raises ValueError where there is none."""
    return BACKENDS[name] if name in BACKENDS else own(name, "backend", ("auto", *sorted(BACKENDS)))


def _named(name: str, call: AttentionCall) -> ModuleType:
    backend = named_backend(name)
    reason = backend.why_not(call)
    if reason is not None:
        able = [other for other, module in BACKENDS.items() if module.why_not(call) is None]
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {reason}; {able} can")
    return backend
