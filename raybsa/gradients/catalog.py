"""The codecs by name, and ``build``: from a name and parameters, or a spec's dict, to a codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from raybsa.gradients.cast import BFloat16, Float16
from raybsa.gradients.codec import Codec
from raybsa.gradients.int8 import Int8
from raybsa.gradients.none import Uncompressed
from raybsa.gradients.powersgd import PowerSGD
from raybsa.gradients.topk import TopK
from raybsa.own import own

CATALOG: dict[str, type[Codec]] = {
    codec.name: codec for codec in (Uncompressed, Float16, BFloat16, Int8, TopK, PowerSGD)
}


def build(codec: Codec | Mapping[str, Any] | str, **params: Any) -> Codec:
    """The codec of a name and its parameters, or of ``codec.spec``; a codec is returned as it is.

    >>> build("powersgd", rank=2) == build({"name": "powersgd", "params": {"rank": 2}})
    True

    Raises:
        ValueError: an unknown codec or parameter, or a value out of range.
        TypeError: something else than the above, or parameters beside a codec or a dict.
    """
    if isinstance(codec, str):
        return _made(codec, params)
    if params:
        raise TypeError(f"parameters go with a name, got {', '.join(sorted(params))} beside {codec!r}")
    if isinstance(codec, Codec):
        return codec
    if not isinstance(codec, Mapping):
        raise TypeError(f"a codec is a Codec, its spec's dict or a name, got {codec!r}")
    if not {"name"} <= set(codec) <= {"name", "params"}:
        raise ValueError(f"a codec's dict has the keys 'name' and 'params', got {sorted(codec)}")
    return _made(codec["name"], codec.get("params") or {})


def _made(name: str, params: Mapping[str, Any]) -> Codec:
    cls = CATALOG[name] if name in CATALOG else own(name, "codec", CATALOG)
    if not (isinstance(cls, type) and issubclass(cls, Codec)):
        raise TypeError(f"codec {name!r} must name a subclass of raybsa.gradients.Codec, got {cls!r}")
    known = [field.name for field in fields(cls)]
    unknown = sorted(set(params) - set(known))
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"codec {name} has no parameter {', '.join(unknown)}; {has}")
    return cls(**params)
