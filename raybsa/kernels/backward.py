"""attention_backward: the gradients of a part of the keys, for a softmax that was normalised over more of them.

A ring visits a row's keys part by part. With the row's final lse the weights of each part are ``exp(score - lse)``, so
its gradients need nothing of the other parts (Ring Attention, 2310.01889).
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from raybsa.kernels import blocked, cpp, triton_backend
from raybsa.kernels.call import AttentionCall, check_call, decided

BACKENDS = {"triton": triton_backend, "cpp": cpp, "blocked": blocked}


def attention_backward(
    call: AttentionCall, lse: Tensor, delta: Tensor, grad_out: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and block_bias (None where there is none), from the keys at hand alone.

    Args:
        call: the attention over these keys; no ``attn_mask``.
        lse: (B, H, Sq) of the whole rows, float32 (float64 for float64 inputs); -inf where a row saw nothing.
        delta: (B, H, Sq) ``row_delta`` of the whole rows.
        grad_out: (B, H, Sq, D).
        backend: ``"auto"`` (triton on CUDA and cpp on a CPU where they can serve the call, else blocked) or a name in
            ``BACKENDS``.

    Returns:
        (B, H, Sq, D), (B, Hkv, Skv, D) twice and (nnz,), summed and returned in the compute dtype, so that parts can be
        added before they are rounded.

    Raises:
        ValueError, TypeError: arguments that do not fit together.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """

    def choose() -> ModuleType:
        check_call(call)
        if call.attn_mask is not None:
            raise ValueError("attention_backward takes no attn_mask")
        return own_backend(call, backend)

    module: ModuleType = decided(call, ("backward backend", backend), choose)
    if lse.shape != call.q.shape[:-1] or delta.shape != lse.shape or grad_out.shape != call.q.shape:
        raise ValueError(
            f"lse and delta must be {tuple(call.q.shape[:-1])} and grad_out {tuple(call.q.shape)}, "
            f"got {tuple(lse.shape)}, {tuple(delta.shape)} and {tuple(grad_out.shape)}"
        )
    found: tuple[Tensor, Tensor, Tensor, Tensor | None] = module.backward(call, lse, delta, grad_out)
    return found


def own_backend(call: AttentionCall, backend: str = "auto", of_mask: bool = False) -> ModuleType:
    """The backend of ours that serves a checked call, by the words and errors of ``attention_backward``.

    Args:
        of_mask: it is asked for the gradient of attn_mask, which only ``blocked`` makes.
    """
    if of_mask and backend in ("auto", "blocked"):
        return blocked
    if of_mask and backend in BACKENDS:
        raise NotImplementedError(f"backend {backend!r} makes no gradient of attn_mask: 'auto' and 'blocked' do")
    if backend == "auto":
        ours = BACKENDS["triton" if call.q.is_cuda else "cpp"]
        return ours if ours.why_not(call) is None else blocked
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    reason = BACKENDS[backend].why_not(call)
    if reason is not None:
        raise NotImplementedError(f"backend {backend!r} cannot serve this call: {reason}")
    return BACKENDS[backend]
