"""The hooks by which a module of anyone's attends as we serve it; for ``swap`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raybsa.variants.attend import attend
from raybsa.variants.multihead import BlockSparseMultihead
from raybsa.variants.selector import BlockSelector
from raybsa.variants.source import LayoutSource
from raybsa.variants.swap_masks import settle_mask


class Served(NamedTuple):
    """What serves a module's calls: where the layouts come from, and the backend."""

    source: LayoutSource
    backend: str = "auto"


Serve = Callable[[Tensor | None, bool], tuple[Served, Tensor | None]]  # (attn_mask, is_causal) -> (by whom, the mask)
_ATTENTIONS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


class Swapped:
    """The hooks that know which module is at work, and put our attention in torch's place meanwhile.

    ``choose``: (module, whether its call is causal) -> what serves it. ``leave``: modules that are left to torch.
    """

    def __init__(self, model: nn.Module, choose: Callable[[str, bool], Served], leave: Set[str] = frozenset()) -> None:
        self.model, self.choose, self.leave = model, choose, leave
        self.trail: list[str] = []
        self.mode = _Mode(self)
        self.undo = ExitStack()

    def apply(self) -> None:
        for name, module in list(self.model.named_modules()):
            if any(isinstance(hook, _Enter) for hook in module._forward_pre_hooks.values()):
                raise NotImplementedError(f"{named(name)}: it is swapped already, undo that first")
            if isinstance(module, BlockSparseMultihead):
                raise NotImplementedError(
                    f"{named(name)}: nn.MultiheadAttention was wanted, it is block-sparse already"
                )
            if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
                raise NotImplementedError(f"{named(name)}: a model that is not compiled was wanted, got torch.compile")
            before = module.register_forward_pre_hook(_Enter(self._enter, name), prepend=True)
            after = module.register_forward_hook(self._leave, always_call=True)
            self.undo.callback(before.remove)
            self.undo.callback(after.remove)
            if type(module) is nn.MultiheadAttention and name not in self.leave:
                self._become_ours(name, module)

    def own(self, module: nn.Module, source: BlockSelector) -> None:
        """Makes a learned source a part of the module that it serves."""
        name = "source" if isinstance(module, _Multihead) else "raybsa_source"
        module.add_module(name, source)
        self.undo.callback(module._modules.pop, name, None)

    def serve(self, name: str, attn_mask: Tensor | None, is_causal: bool) -> tuple[Served, Tensor | None]:
        """What serves this call, and the mask that it is to apply."""
        causal, rest = settle_mask(attn_mask, is_causal)
        served = self.choose(name, causal)
        if served.source.causal and not causal:
            raise ValueError("a causal call was wanted, as its first one: this one shows later keys")
        if is_causal and not served.source.causal:
            raise ValueError("a call with is_causal=False was wanted, as its first one: got is_causal=True")
        return served, rest if served.source.causal else attn_mask

    def _become_ours(self, name: str, module: nn.Module) -> None:
        """Parameters, hooks and the place in the model stay; the class is another, and what the layer around it asks
        before it takes torch's fused path."""
        fields = {"_qkv_same_embed_dim": False, "serve": partial(self.serve, name), "swapped_as": named(name)}
        before = dict(module.__dict__)
        module.__class__ = _Multihead
        module.__dict__.update(fields)

        def undo() -> None:
            module.__class__ = nn.MultiheadAttention
            for key in (*fields, "source", "backend"):
                module.__dict__.pop(key, None)
            module.__dict__["_qkv_same_embed_dim"] = before["_qkv_same_embed_dim"]

        self.undo.callback(undo)

    def _enter(self, name: str, *_: Any) -> None:
        if torch.compiler.is_compiling():  # it would trace torch's attention, dense
            raise NotImplementedError(f"{named(name)}: a model that is not compiled was wanted, got torch.compile")
        if not self.trail:
            self.mode.__enter__()
        self.trail.append(name)

    def _leave(self, *_: Any) -> None:
        self.trail.pop()
        if not self.trail:
            self.mode.__exit__(None, None, None)


class _Enter(partial[None]):
    """Our own hook, to be known again."""


class _Mode(TorchFunctionMode):
    """While a module of the model is at work: its calls of torch's attention are ours."""

    def __init__(self, swapped: Swapped) -> None:
        super().__init__()
        self.swapped = swapped

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self.swapped.trail[-1]
        if func not in _ATTENTIONS or name in self.swapped.leave:
            return func(*args, **(kwargs or {}))
        with _naming(named(name)):
            if func is F.multi_head_attention_forward:
                raise NotImplementedError(
                    "F.scaled_dot_product_attention or nn.MultiheadAttention itself was wanted, not a class made from "
                    "it, got F.multi_head_attention_forward"
                )
            return _attend(partial(self.swapped.serve, name), *args, **(kwargs or {}))


class Outside(TorchFunctionMode):
    """Refuses torch's attention where no module of the model is at work: it would stay dense without a word."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ATTENTIONS:
            raise NotImplementedError(
                f"attention within the forward of the model or of a module in it was wanted, got {func.__name__} "
                "called from elsewhere"
            )
        return func(*args, **(kwargs or {}))


def _attend(
    serve: Serve,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` over the kept blocks."""
    (source, backend), mask = serve(attn_mask, is_causal)
    return attend(source, query, key, value, scale=scale, attn_mask=mask, dropout_p=dropout_p, backend=backend)


class _Multihead(BlockSparseMultihead):
    """What an ``nn.MultiheadAttention`` becomes: it is served anew in each call."""

    serve: Serve
    swapped_as: str

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``BlockSparseMultihead``; masks say True for what may NOT be attended."""
        with _naming(self.swapped_as):
            (self.source, self.backend), mask = self.serve(_opposite(attn_mask), is_causal)
            causal = mask is None and self.source.causal
            return super().forward(
                query, key, value, key_padding_mask, need_weights, _opposite(mask), average_attn_weights, causal
            )


def named(name: str) -> str:
    return f"module {name!r}" if name else "the model itself"


@contextmanager
def _naming(module: str) -> Iterator[None]:
    """What we do not serve says which module it is about."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        raise NotImplementedError(f"{module}: {error}") from error


def _opposite(mask: Tensor | None) -> Tensor | None:
    """A mask of ``nn.MultiheadAttention`` as SDPA takes it, and back."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask
