"""A torch module of the user's own: trained on its own data, judged by its own held-out loss, under any pattern.

``raybsa.tasks.question`` has the contract, ``raybsa.variants.swap`` what is swapped. What is timed are the module's own
attention calls alone: those of one forward on its first batch, masks included, one after another, beside torch's SDPA
on the same q, k, v; no projections, nothing else of the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from raybsa.content import code_digest
from raybsa.kernels.api import run_call
from raybsa.kernels.call import AttentionCall
from raybsa.spec import MODULE, TrialSpec
from raybsa.tasks.goals import QUALITIES
from raybsa.tasks.params import known_params, require_same
from raybsa.tasks.question import Asked, ask, digest_of, to
from raybsa.tasks.speed import OwnAttention, Stacks
from raybsa.tasks.training import Training
from raybsa.timing import DeviceLock
from raybsa.variants.swap import Attending, attending, served_by, swap
from raybsa.variants.swap_masks import dense_mask
from raybsa.variants.swap_served import Served


def prepare_training(spec: TrialSpec, device: torch.device, lock: DeviceLock) -> Training:
    """A training of the user's module, which attends as the spec says: one for all modules that attend, or one each.

    The dense baseline is the module untouched. ``task_params``: ``function`` (``/path/to/file.py:name``) and
    ``modules`` (the names of those that attend, by number), as ``question_of`` finds them.

    Raises:
        ValueError: the function breaks its contract, or attends otherwise than the spec's sizes say.
        NotImplementedError: an attention that cannot be swapped exactly; the message names the module.
    """
    function = known_params(spec, {"function": None, "modules": None})["function"]
    if not function:
        raise ValueError("task 'module' needs the parameter 'function', as '/path/to/file.py:name'")
    require_same(spec, "code", code_digest(function), f"the code of {function}")
    with lock.shared():
        asked = ask(function, spec.seed, device)
        found = _attending(function, asked)
        if (seen := _sized(spec, function, found)) != spec:
            raise ValueError(
                f"{function} must attend for every seed as it did when the search began, {_words(spec)}: got "
                f"{_words(seen)}"
            )
        served = served_by(found, spec.attention, asked.model)
        if any(served.values()):
            swap(asked.model, served)
    name, goal = QUALITIES[MODULE]
    return Training(
        asked.model,
        lambda step: next(asked.batches),
        lambda: _held_out_loss(asked, device, lock),
        name=name,
        goal=goal,
        steps=spec.train_steps,
        learning_rate=spec.learning_rate,
        lock=lock,
        context=nullcontext(),
        loss=asked.loss,
        attention=_own_attention(found, list(served.values())),
    )


def question_of(function: str, base: TrialSpec) -> TrialSpec:
    """``base`` asked about a module of the user's own: a layer for each module that attends, the sizes of the largest.

    The function is called here too, with the seed of ``base``, and its loss once.

    Raises:
        ValueError, NotImplementedError: as ``prepare_training``.
    """
    asked = ask(function, base.seed, torch.device("cpu"))
    content = {"code": code_digest(function), "data": digest_of([asked.first, asked.held_out])}
    return _sized(replace(base, content=content), function, _attending(function, asked))


# ---- for ourselves -------------------------------------------------------------------------------------------------


def _attending(function: str, asked: Asked) -> list[Attending]:
    found = attending(asked.model.eval(), lambda: asked.loss(asked.model, asked.first))
    if not found:
        raise ValueError(
            f"a model that calls F.scaled_dot_product_attention or has an nn.MultiheadAttention at work was wanted of "
            f"{function}, got {type(asked.model).__name__}, whose loss comes without either"
        )
    return found


def _sized(spec: TrialSpec, function: str, found: Sequence[Attending]) -> TrialSpec:
    calls = [one.call for one in found]
    largest = max(calls, key=lambda call: call.q.shape[2] * call.k.shape[2])
    batch, heads, _, head_dim = largest.q.shape
    kv_heads, tokens = largest.k.shape[1], largest.k.shape[2]
    return replace(
        spec,
        task=MODULE,
        task_params={"function": function, "modules": [one.name for one in found]},
        attention=spec.attention if len(spec.attention) in (1, len(found)) else spec.attention[:1],
        seq_len=tokens,
        train_len=tokens,
        batch=batch,
        num_layers=len(found),
        num_heads=heads,
        num_kv_heads=None if kv_heads == heads else kv_heads,
        head_dim=head_dim,
        causal=all(call.layout.causal for call in calls),
        dtype=str(largest.q.dtype).removeprefix("torch."),
    )


def _held_out_loss(asked: Asked, device: torch.device, lock: DeviceLock) -> float:
    """The mean over the batches held out."""
    asked.model.eval()
    total = 0.0
    for batch in asked.held_out:
        with torch.no_grad(), lock.shared():
            total += float(asked.loss(asked.model, to(batch, device)))
    return total / len(asked.held_out)


def _own_attention(found: Sequence[Attending], served: Sequence[Served | None]) -> OwnAttention:
    calls = list(dict.fromkeys(one.call for one in found))  # the inputs of those alike are shared
    inputs = tuple(x for call in calls for x in (call.q, call.k, call.v))
    where = [calls.index(one.call) for one in found]
    densities = [
        1.0 if by is None else by.source.layout(*_lengths(one.call), torch.device("cpu")).density
        for one, by in zip(found, served, strict=True)
    ]

    def stacks() -> Stacks:
        masks = [dense_mask(call) for call in calls]

        def attend(dense: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
            outs = []
            for place, by in zip(where, served, strict=True):
                q, k, v = inputs[3 * place : 3 * place + 3]
                call = replace(calls[place], q=q, k=k, v=v)
                outs.append(_dense(call, *masks[place]) if dense or by is None else _ours(call, by))
            return tuple(outs)

        return Stacks(partial(attend, False), partial(attend, True), inputs)

    return OwnAttention(sum(densities) / len(densities), stacks)


def _ours(call: AttentionCall, by: Served) -> Tensor:
    selection = by.source.select(call.q, call.k, call.attn_mask, call.segment_ids)
    layout, bias = selection.layout, selection.block_bias
    mask = call.attn_mask if selection.attn_mask is None else selection.attn_mask
    call = replace(call, layout=layout, attn_mask=mask, block_bias=bias)
    return by.source.complete(selection, call, run_call(call, by.backend)[0])


def _dense(call: AttentionCall, mask: Tensor | None, is_causal: bool) -> Tensor:
    grouped = call.q.shape[1] != call.k.shape[1]
    return F.scaled_dot_product_attention(
        call.q, call.k, call.v, mask, call.dropout_p, is_causal, scale=call.scale, enable_gqa=grouped
    )


def _lengths(call: AttentionCall) -> tuple[int, int, int]:
    return call.q.shape[2], call.k.shape[2], call.q.shape[1]


def _words(spec: TrialSpec) -> str:
    return (
        f"{spec.num_layers} modules ({', '.join(map(repr, spec.task_params['modules'] or ()))}), the largest with "
        f"batch {spec.batch}, {spec.num_heads} heads, {spec.num_kv_heads or spec.num_heads} KV heads, head_dim "
        f"{spec.head_dim}, {spec.seq_len} tokens, causal={spec.causal}, {spec.dtype}"
    )
