"""Served modules: how the attention of a module of anyone's is computed over the blocks of a source; for ``swap``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raybsa.variants.attend import attend
from raybsa.variants.multihead import BlockSparseMultihead
from raybsa.variants.selector import BlockSelector
from raybsa.variants.source import LayoutSource
from raybsa.variants.swap_masks import settle_mask
from raybsa.variants.swap_watch import MULTIHEAD, SDPA, is_attention, named, service_of, watch


class Served(NamedTuple):
    """What serves a module's calls: where the layouts come from, and the backend."""

    source: LayoutSource
    backend: str = "auto"


_LEFT_TO_TORCH = ContextVar("raybsa_left_to_torch", default=False)  # for ``Outside``
Choose = Callable[[bool], Served]  # whether a call is causal -> what serves it


@dataclass(frozen=True, eq=False)
class Service:
    """How the attention of the module of this name is served; ``choose`` None leaves it to torch."""

    name: str
    choose: Choose | None

    def attend(
        self, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """As ``swap_watch.Service``."""
        if self.choose is None:
            with _left_to_torch():
                return function(*args, **kwargs)
        with naming(self.name):
            if function is MULTIHEAD:
                raise NotImplementedError(
                    "F.scaled_dot_product_attention or nn.MultiheadAttention itself was wanted, not a class made from "
                    "it, got F.multi_head_attention_forward"
                )
            if function is not SDPA:
                raise NotImplementedError(
                    f"F.scaled_dot_product_attention was wanted, got {function}: an exported graph, say, calls that"
                )
            return self._attend(module, *args, **kwargs)

    def settle(
        self, module: nn.Module, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[LayoutSource, str, Tensor | None]:
        """The source and backend that serve this call of the module, and the mask that it is to apply."""
        assert self.choose is not None
        causal, rest = settle_mask(attn_mask, is_causal)
        source, backend = self.choose(causal)
        if source.causal and not causal:
            raise ValueError("a causal call was wanted, as its first one: this one shows later keys")
        if is_causal and not source.causal:
            raise ValueError("a call with is_causal=False was wanted, as its first one: got is_causal=True")
        if isinstance(source, BlockSelector):  # a replica has one of its own
            source = module._modules[_child_name(module)]  # type: ignore[assignment]
        return source, backend, rest if source.causal else attn_mask

    def _attend(
        self,
        module: nn.Module,
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
        source, backend, mask = self.settle(module, attn_mask, is_causal)
        return attend(source, query, key, value, scale=scale, attn_mask=mask, dropout_p=dropout_p, backend=backend)


def serve_all(model: nn.Module, choose: Callable[[str], Choose | None], undo: ExitStack) -> None:
    """From now on the modules of the model attend as ``choose(name)`` says, until ``undo`` is closed.

    Raises:
        NotImplementedError: a module that cannot be served; the message names it.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, BlockSparseMultihead) and service_of(module) is None:
            raise NotImplementedError(f"{named(name)}: nn.MultiheadAttention was wanted, it is block-sparse already")
        service = Service(name, choose(name))
        if type(module) is nn.MultiheadAttention and service.choose is not None:
            undo.callback(watch(module, service, _Multihead))
            undo.callback(module.__dict__.__setitem__, "_qkv_same_embed_dim", module._qkv_same_embed_dim)
            module._qkv_same_embed_dim = False  # what the layer around it asks before it takes torch's fused path
        else:
            undo.callback(watch(module, service))


def own(module: nn.Module, source: BlockSelector, undo: ExitStack) -> None:
    """Makes a learned source a part of the module that it serves, until ``undo`` is closed."""
    name = _child_name(module)
    module.add_module(name, source.train(module.training))
    undo.callback(module._modules.pop, name, None)


class Outside(TorchFunctionMode):
    """Refuses torch's attention where no module of the model is at work: it would stay dense without a word. Another
    swapped model's that stays dense on purpose is none of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_attention(func) and not _LEFT_TO_TORCH.get():
            raise NotImplementedError(
                f"attention within the forward of the model or of a module in it was wanted, got {func.__name__} "
                "called from elsewhere"
            )
        return func(*args, **(kwargs or {}))


class _Multihead(BlockSparseMultihead):
    """What an ``nn.MultiheadAttention`` becomes. Parameters, hooks and its place in the model stay."""

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
        service: Service = service_of(self)
        with naming(service.name):
            source, backend, mask = service.settle(self, _opposite(attn_mask), is_causal)
            masks = (key_padding_mask, need_weights, _opposite(mask), average_attn_weights)
            return self._over(source, backend, query, key, value, *masks, mask is None and source.causal)

    def extra_repr(self) -> str:
        size = f"{self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"
        return f"{size}, {service_of(self).choose}"


@contextmanager
def naming(module: str) -> Iterator[None]:
    """What we do not serve says which module it is about."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        raise NotImplementedError(f"{named(module)}: {error}") from error


@contextmanager
def _left_to_torch() -> Iterator[None]:
    before = _LEFT_TO_TORCH.set(True)
    try:
        yield
    finally:
        _LEFT_TO_TORCH.reset(before)


def _child_name(module: nn.Module) -> str:
    return "source" if isinstance(module, _Multihead) else "raybsa_source"


def _opposite(mask: Tensor | None) -> Tensor | None:
    """A mask of ``nn.MultiheadAttention`` as SDPA takes it, and back."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask
