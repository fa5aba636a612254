"""Any torch module's own attention over the blocks that sources keep, without a change to its code.

Seen is what attends inside of the forward of the model or of a module in it: an ``nn.MultiheadAttention``, and each
call of ``F.scaled_dot_product_attention`` by whatever name. Not seen are FlexAttention, a product and softmax written
out by hand (refused in a class that is named for attention), and what a forward has threads of its own compute, unless
they call modules of the model. A compiled, scripted or exported model is refused; ``torch.compile`` leaves a swapped
one as it is. An attending module has a number: its place in the order of first calls.

    swap_attention(model, best["layers"], lambda: model(inputs))    # the point of a search, in the module it was for
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from raybsa.kernels.call import AttentionCall
from raybsa.layout import BlockLayout
from raybsa.spec import DENSE, AttentionSpec
from raybsa.variants.by_hand import writes_out
from raybsa.variants.selection import Selection
from raybsa.variants.selector import BlockSelector
from raybsa.variants.source import FixedPattern, layout_source
from raybsa.variants.swap_served import Choose, Outside, Served, own, serve_all
from raybsa.variants.swap_watch import check_uncovered, named

VARIANTS = ("base", "adaptive", DENSE)
_OF_THE_MODULE = ("causal", "num_heads", "head_dim", "num_kv_heads")  # arguments that its own calls answer


@dataclass(frozen=True, eq=False)
class Attending:
    """A module that attends, by its name in ``named_modules``, and its first call: over all blocks, detached.

    Modules whose first calls are alike but for their numbers share one.
    """

    name: str
    call: AttentionCall


def attending(model: nn.Module, run: Callable[[], object]) -> list[Attending]:
    """What of ``model`` attends while ``run()`` calls it, by number. ``run`` sees what the model computes by itself.

    Raises:
        NotImplementedError: an attention that cannot be swapped exactly; the message names the module.
    """
    found: dict[str, Attending] = {}
    alike: dict[tuple[int, bool], AttentionCall] = {}
    everything = {causal: FixedPattern(DENSE, causal=causal) for causal in (False, True)}

    def keep(name: str, call: AttentionCall) -> None:
        first = alike.setdefault((call.signature, call.layout.causal), call)
        known = found.setdefault(name, Attending(name, first)).call
        if _kind(known) != _kind(call):
            raise NotImplementedError(
                "calls of one module with the same (heads, KV heads, head_dim, causal) were wanted, "
                f"got {_kind(known)} and {_kind(call)}"
            )

    def choose(name: str) -> Choose:
        return lambda causal: Served(_Recorder(name, everything[causal], keep))

    with torch.no_grad(), Outside(), ExitStack() as undo:
        serve_all(model, choose, undo)
        run()
    return list(found.values())


def swap(model: nn.Module, served: Mapping[str, Served | None]) -> Callable[[], None]:
    """From now on the modules of these names attend as they are served; one that has None is left as it is.

    A learned source becomes a part of its module. ``state_dict`` is otherwise what it was, and so are names, places and
    hooks of the modules; the class of each is one made from its own. A call that its source cannot serve exactly raises
    NotImplementedError, and names the module.

    Any number of threads may call the model, replicas of it (``nn.DataParallel``) or tasks of asyncio: what is at work
    belongs to a call, however it ends. Swap it, and undo that, while nobody calls it. ``copy.deepcopy``, ``pickle`` and
    ``torch.save`` of the model give a swapped one, which cannot be undone.

    Returns:
        What undoes it. It raises RuntimeError, and undoes nothing, where a module has got yet another class meanwhile.
    """
    unknown = _Unknown(tuple(served))

    def choose(name: str) -> Choose | None:
        one = served.get(name)
        return _Given(one) if one is not None else None if name in served else unknown

    with ExitStack() as undo:
        serve_all(model, choose, undo)
        for name, one in served.items():
            if one is not None and isinstance(one.source, BlockSelector):
                own(model.get_submodule(name), one.source, undo)
        kept = undo.pop_all()

    def take_back() -> None:
        check_uncovered(model)  # before anything is given back, so that nothing is half swapped
        kept.close()

    return take_back


def swap_attention(
    model: nn.Module, attentions: Sequence[AttentionSpec | Mapping[str, Any]], run: Callable[[], object]
) -> Callable[[], None]:
    """``swap`` by data: the attention of each attending module, as ``best["layers"]`` of a search's point has them.

    Args:
        attentions: one for all, or one a module, by number. Its heads, and whether it attends causally, are a module's
            own affair.
        run: calls the model once as it is used, so that what attends is seen.

    Returns:
        What undoes it.

    Raises:
        NotImplementedError: an attention that cannot be swapped exactly; the message names the module.
        ValueError: another number of attentions than of modules that attend, or a variant that is not for them.
    """
    specs = [_spec(one) for one in attentions]
    return swap(model, served_by(attending(model, run), specs, model))


def served_by(
    found: Sequence[Attending], attentions: Sequence[AttentionSpec], model: nn.Module
) -> dict[str, Served | None]:
    """What serves each of ``found`` as ``attentions`` ask, one for all or one each; modules alike share a fixed one.

    Raises:
        ValueError: another number of attentions, or one that is not of ``VARIANTS``.
        NotImplementedError: beside what attends so, a class named for attention writes it out, and would stay dense.
    """
    if not found:
        raise ValueError(
            "a model was wanted that calls F.scaled_dot_product_attention or has an nn.MultiheadAttention at work, got "
            f"{type(model).__name__}, which has neither: attention written out as a product and a softmax is not seen"
        )
    for name, module in model.named_modules():
        cls: Any = type(module)
        if writes_out(cls) is not None:
            raise NotImplementedError(
                f"{named(name)}: a call of F.scaled_dot_product_attention was wanted, got {cls.__name__}, whose "
                f"attention is written out ({writes_out(cls)}) and would stay dense beside the swapped ones"
            )
    if len(attentions) not in (1, len(found)):
        raise ValueError(
            f"one attention for all, or one for each module that attends, was wanted: got {len(attentions)} for "
            f"{len(found)} ({', '.join(named(one.name) for one in found)})"
        )
    fixed: dict[tuple[AttentionSpec, bool], Served] = {}
    served: dict[str, Served | None] = {}
    for number, one in enumerate(found):
        attention = attentions[number % len(attentions)]
        if attention.variant not in VARIANTS:
            raise ValueError(f"an own module attends by the variants {VARIANTS}, got {attention.variant!r}")
        key = (attention, one.call.layout.causal)
        known = fixed.get(key) or (None if attention.variant == DENSE else _make(attention, one.call, model))
        served[one.name] = known
        if known is not None and isinstance(known.source, FixedPattern):
            fixed[key] = known
    return served


# ---- for ourselves -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Given:
    """The choice for a module that was given what serves it."""

    served: Served

    def __call__(self, causal: bool) -> Served:
        return self.served

    def __repr__(self) -> str:
        source, backend = self.served
        return f"{'learned' if isinstance(source, BlockSelector) else source}, backend={backend!r}"


@dataclass(frozen=True, eq=False)
class _Unknown:
    """The choice for a module that did not attend when sources were given."""

    attended: tuple[str, ...]

    def __call__(self, causal: bool) -> Served:
        raise ValueError(f"it attends, but only {', '.join(map(named, self.attended))} did when sources were given")


class _Recorder:
    """A source of all blocks that shows each call to ``keep``."""

    def __init__(self, name: str, inner: FixedPattern, keep: Callable[[str, AttentionCall], None]) -> None:
        self.name, self.inner, self.keep = name, inner, keep
        self.causal = inner.causal

    def select(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None = None,
        segment_ids: tuple[Tensor, Tensor] | None = None,
    ) -> Selection:
        return self.inner.select(q, k)

    def complete(self, selection: Selection, call: AttentionCall, out: Tensor) -> Tensor:
        q, k, v = (x.detach() for x in (call.q, call.k, call.v))
        self.keep(self.name, replace(call, q=q, k=k, v=v, return_lse=False))
        return out

    def layout(self, q_len: int, kv_len: int, num_heads: int, device: torch.device) -> BlockLayout:
        return self.inner.layout(q_len, kv_len, num_heads, device)


def _make(attention: AttentionSpec, call: AttentionCall, model: nn.Module) -> Served:
    source = layout_source(
        attention.pattern,
        None,
        None,
        density=attention.density,
        block_size=attention.block_size,
        causal=call.layout.causal,
        num_heads=call.q.shape[1],
        num_kv_heads=call.k.shape[1],
        head_dim=call.q.shape[3],
    )
    if isinstance(source, BlockSelector):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), call.q.dtype)
        source = source.to(call.q.device, dtype)
    return Served(source, attention.backend)


def _spec(attention: AttentionSpec | Mapping[str, Any]) -> AttentionSpec:
    if isinstance(attention, AttentionSpec):
        return attention
    return AttentionSpec.from_dict({key: value for key, value in attention.items() if key not in _OF_THE_MODULE})


def _kind(call: AttentionCall) -> tuple[int, int, int, bool]:
    return call.q.shape[1], call.k.shape[1], call.q.shape[3], call.layout.causal
