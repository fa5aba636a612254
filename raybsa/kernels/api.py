"""block_sparse_attention: the one call; it checks the arguments and picks a backend that can serve them."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from raybsa.kernels import auto, blocked, compiled, cpp, flex, reference, triton_backend
from raybsa.kernels.call import AttentionCall, cast_inputs, check_call, decided
from raybsa.kernels.compiled import draw_seed
from raybsa.kernels.eager import eagerly
from raybsa.kernels.peers import cudnn, fa4
from raybsa.layout import BlockLayout
from raybsa.own import own

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
    of other makers, ``reference`` and a gradient of attn_mask do break the graph.

    Args:
        q: (B, H, Sq, D) float16, bfloat16, float32 or float64.
        k: (B, Hkv, Skv, D) with H a multiple of Hkv: query head h reads KV head ``h // (H // Hkv)``.
        v: (B, Hkv, Skv, D).
        layout: which KV blocks each query block attends, for Sq and Skv tokens, on q's device.
        scale: factor on the scores; None means ``1 / sqrt(D)``.
        attn_mask: broadcastable to (B, H, Sq, Skv), never expanded; bool (True = attend) or added to the scores.
        segment_ids: int tensors (B, Sq) and (B, Skv); tokens of different segments do not see each other.
        block_bias: (nnz,) added to the scores of its block, in the layout's storage order; differentiable.
        dropout_p: share of the attention weights to drop, in [0, 1); the rest is scaled by ``1 / (1 - dropout_p)``.
        seed: what dropout is drawn from (``raybsa.counter``), by global positions; None draws one from torch's default
            CPU generator.
        deterministic: True asks for bit-equal repeats; None follows ``torch.use_deterministic_algorithms``.
        return_lse: also return lse (B, H, Sq), natural log, float32 (float64 for float64 inputs), differentiable.
        backend: ``"auto"`` or a name in ``BACKENDS``. ``"auto"`` takes what was fastest on this GPU for such a call
            (``raybsa.kernels.auto_table``), our own kernels where nothing like it was measured. Under
            ``torch.compile`` it takes our own.

    Returns:
        out (B, H, Sq, D) in q's dtype, or (out, lse).

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    call = make_call(
        q,
        k,
        v,
        layout,
        scale=scale,
        attn_mask=attn_mask,
        segment_ids=segment_ids,
        block_bias=block_bias,
        dropout_p=dropout_p,
        seed=seed,
        deterministic=deterministic,
        return_lse=return_lse,
    )
    out, lse = run_call(call, backend)
    return (out, lse) if return_lse else out


def make_call(
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
) -> AttentionCall:
    """The call that ``block_sparse_attention`` runs for these arguments, with what they leave open decided."""
    q, k, v = cast_inputs(q, k, v)
    return AttentionCall(
        q,
        k,
        v,
        layout,
        1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else float(scale),
        attn_mask,
        segment_ids,
        block_bias,
        float(dropout_p),
        draw_seed(dropout_p) if seed is None else int(seed),
        torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic,
        return_lse,
    )


def run_call(call: AttentionCall, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """out and lse (only where the call asks for it) of a call made elsewhere; raises as ``block_sparse_attention``."""
    if torch.compiler.is_compiling():
        return compiled.run(call, backend) if compiled.can_serve(call, backend) else eagerly(_run_late, call, backend)
    module = _chosen(call, backend)
    if not torch.is_autocast_enabled(call.q.device.type):
        return module.run(call)
    with torch.autocast(call.q.device.type, enabled=False):
        return module.run(call)


def _run_late(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    return run_call(compiled.settle(call), backend)


def _chosen(call: AttentionCall, backend: str) -> ModuleType:
    """The backend of a checked call; checks and choice hold for all calls of the same signature and layout."""

    def choose() -> ModuleType:
        check_call(call)
        return BACKENDS[choose_backend(call)] if backend == "auto" else _named(backend, call)

    found: ModuleType = decided(call, ("backend", backend), choose)
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
