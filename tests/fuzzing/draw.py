"""A random case from a seed and a number: the same on every machine, whatever is installed there."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from tests.fuzzing.case import Case

LENGTHS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 70, 96, 100, 129, 150)
LONG = (200, 256, 300, 511, 640, 1000)
HEAD_DIMS = (1, 2, 3, 8, 16, 16, 16, 24, 32, 32, 33, 48, 64, 80, 128)
BLOCKS = (1, 2, 4, 8, 16, 16, 32, 32, 64, 128)
PATTERNS = """
    random random random empty dense sliding_window dilated global_blocks sink_window strided fixed random_blocks
    bigbird chunked vertical_slash power_of_two butterfly document union per_head
"""
TRANSFORMS = """
    backward backward backward backward plain inference checkpoint checkpoint_reentrant compile make_fx make_fx_grad
    jit_trace export func_grad vmap vmap_grad jvp double_backward autocast fake meta dtensor pickled two_tensor
"""
OF_MODULES = """
    backward backward plain inference checkpoint compile make_fx jit_trace export func_grad vmap jvp autocast fake
    functional_call deepcopy
"""
DROPPED = "backward checkpoint checkpoint_reentrant compile func_grad autocast pickled deepcopy"
OF_MULTIHEAD = """
    batch_first bias_kv zero_attn no_bias apart weights each_head unbatched padding float_padding kdim vdim hint mask_3d
"""
MISUSES = """
    narrow_keys fewer_values odd_heads other_batch other_type whole_numbers three_dims long_mask mask_of_counts
    ids_of_floats long_ids one_ids long_bias bias_of_counts layout_of_other_lengths no_layout all_dropped
    scale_of_a_tensor unknown_backend
"""
MASK_SHAPES = ("1111", "0111", "1011", "0011", "1001", "0001", "1010", "0000", "111", "011", "11", "01", "10", "1", "")


def draw(seed: int, index: int, device: str = "cpu") -> Case:
    """Case number ``index`` of a seed."""
    rng = Random(f"{seed}:{index}")
    subject = rng.choices(("function", "parts", "base", "multihead", "adaptive"), (60, 8, 8, 14, 10))[0]
    values = {"seed": rng.randrange(2**31), "subject": subject, "device": device}
    case = Case(**values, **_sizes(rng, device), **_layout(rng), **_how(rng, device, subject))
    case = replace(case, **_masks(rng, case), **_of_subject(rng, case))
    case = _fitted(rng, case)
    return _for_cpp(case) if case.backend == "cpp" and _chance(rng, 0.8) else case


def _chance(rng: Random, share: float) -> bool:
    return rng.random() < share


def _sizes(rng: Random, device: str) -> dict[str, Any]:
    lengths = LENGTHS + (LONG if device == "cuda" or _chance(rng, 0.05) else ())
    q_len, head_dim, q_block = rng.choice(lengths), rng.choice(HEAD_DIMS), rng.choice(BLOCKS)
    kv_heads, batch = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3))
    if device == "cuda" and _chance(rng, 0.1):
        head_dim = rng.choice((160, 192, 256))
    sizes = {
        "batch": batch,
        "kv_heads": kv_heads,
        "heads": kv_heads * rng.choice((1, 1, 2, 3, 4)),
        "q_len": q_len,
        "kv_len": q_len if _chance(rng, 0.6) else rng.choice(lengths),
        "head_dim": head_dim,
        "v_dim": head_dim if _chance(rng, 0.85) else rng.choice(HEAD_DIMS),
        "q_block": q_block,
        "kv_block": q_block if _chance(rng, 0.7) else rng.choice(BLOCKS),
    }
    limit = 3e7 if device == "cuda" else 1e6
    if sizes["batch"] * sizes["heads"] * sizes["q_len"] * sizes["kv_len"] > limit:  # a dense float64 oracle must fit
        sizes |= {"batch": 1, "heads": 2, "kv_heads": 1}
    if sizes["q_len"] * sizes["kv_len"] > 2e4 * sizes["q_block"] * sizes["kv_block"]:  # and its loop over blocks end
        sizes |= {"q_block": 16, "kv_block": 32}
    if _chance(rng, 0.04):
        sizes[rng.choice(("batch", "q_len", "kv_len", "v_dim"))] = 0
    return sizes


def _layout(rng: Random) -> dict[str, Any]:
    return {
        "pattern": rng.choice(PATTERNS.split()),
        "groups": rng.choice(("one", "one", "heads", "samples")),
        "density": rng.choice((None, None, 0.05, 0.3, 0.6, 1.0)),
        "causal": _chance(rng, 0.5),
    }


def _how(rng: Random, device: str, subject: str) -> dict[str, Any]:
    backends = ("auto", "blocked", "cpp", "reference") if device == "cpu" else ("auto", "triton", "triton", "blocked")
    rare = "flex" if device == "cpu" else rng.choice(("flex", "reference", "fa4", "cudnn"))
    dtypes = ("float32", "float32", "float64", "bfloat16", "float16")
    return {
        "backend": rare if _chance(rng, 0.01 if device == "cpu" else 0.05) else rng.choice(backends),
        "dtype": rng.choice(dtypes if device == "cpu" else ("bfloat16", *dtypes)),
        "transform": rng.choice((TRANSFORMS if subject == "function" else OF_MODULES).split()),
        "scale": rng.choice((None, None, None, 0.3, 1.0, 0.0, -0.5)),
        "magnitude": rng.choice((1.0, 1.0, 1.0, 1.0, 8.0, 30.0, 0.0)),
        "return_lse": _chance(rng, 0.4),
        "strides": rng.choice(
            ("contiguous", "contiguous", "tokens_first", "sliced", "expanded", "reversed_dims", "packed", "offset")
        ),
        "deterministic": _chance(rng, 0.15),
        "threads": rng.choice((1, 1, 1, 2, 3)) if device == "cpu" else 1,
        "warm": _chance(rng, 0.2),
        "loss": rng.choice(("weighted", "weighted", "sum", "transposed", "first", "last")),
    }


def _masks(rng: Random, case: Case) -> dict[str, Any]:
    kinds = ["bool", "float", "infinite"]
    if case.backend in ("blocked", "reference", "cpp") or case.device == "cpu":  # Triton's are right to 3 digits
        kinds.append("lowest")
    plain = _chance(rng, 0.35)
    kind = "none" if plain or _chance(rng, 0.5) else rng.choice(kinds)
    bias = not plain and _chance(rng, 0.3)
    grads = "qkv" if _chance(rng, 0.7) else "".join(x for x in "qkv" if _chance(rng, 0.5))
    grads += "m" if kind in ("float", "infinite", "lowest") and _chance(rng, 0.4) else ""
    return {
        "mask": kind,
        "mask_shape": rng.choice(MASK_SHAPES),
        "mask_strides": rng.choice(("contiguous", "contiguous", "expanded", "transposed")),
        "bias_dtype": rng.choice(("same", "same", "float32", "float64", "bfloat16")),
        "mask_dtype": rng.choice(("same", "same", "float32", "float64", "bfloat16")),
        "segments": 0 if plain or _chance(rng, 0.7) else rng.choice((1, 2, 3, 5)),
        "segment_dtype": rng.choice(("int64", "int32", "int16", "uint8", "bool")),
        "bias": bias,
        "dropout": 0.0 if plain or _chance(rng, 0.8) else rng.choice((0.1, 0.5, 0.9)),
        "grad_of": grads + ("b" if bias and _chance(rng, 0.7) else ""),
    }


def _of_subject(rng: Random, case: Case) -> dict[str, Any]:
    if case.subject == "multihead":
        return {"extras": tuple(x for x in OF_MULTIHEAD.split() if _chance(rng, 0.3))}
    if case.subject == "adaptive":
        method = rng.choice(("distill", "bias", "compressed", "mean-pool"))
        words = ("top_p", "sinks", "window", "cap", "segmented")
        return {"extras": (method, *(x for x in words if _chance(rng, 0.25)))}
    return {}


def _seedless(case: Case) -> Case:
    """The case with dropout that draws its own seed, and a gradient of v."""
    sizes = {name: max(getattr(case, name), 1) for name in ("batch", "q_len", "kv_len", "v_dim")}
    transform = case.transform if case.transform in DROPPED.split() else "backward"
    how = {
        "transform": transform,
        "loss": "weighted",
        "return_lse": False,
        "grad_of": case.grad_of.replace("v", "") + "v",
    }
    return replace(case, dropout=0.4, seedless=True, **how, **sizes)


def _odd(rng: Random, case: Case) -> Case:
    """Now and then one tensor in several places, or a call that is wrong."""
    if case.seedless:
        return case
    if _chance(rng, 0.06):
        sizes = {"v_dim": case.head_dim, "shared": "kv"}
        if _chance(rng, 0.5):
            sizes |= {"shared": "qkv", "kv_len": case.q_len, "kv_heads": case.heads}
        return replace(case, **sizes)
    sizes = (case.batch, case.q_len, case.kv_len, case.v_dim)
    if _chance(rng, 0.06) and case.transform not in ("fake", "meta") and all(sizes):
        return replace(case, misuse=rng.choice(MISUSES.split()))
    return case


def _for_cpp(case: Case) -> Case:
    """The case as the C++ kernels serve it."""
    width = max(16, case.head_dim // 16 * 16)
    plain = {"dtype": "float32", "head_dim": width, "v_dim": width, "mask": "none", "segments": 0, "bias": False}
    extras = tuple(x for x in case.extras if x not in ("padding", "float_padding"))
    grads = case.grad_of.replace("m", "").replace("b", "")
    return replace(case, **plain, dropout=0.0, seedless=False, grad_of=grads, extras=extras)


def _fitted(rng: Random, case: Case) -> Case:
    """The case without what its subject does not know."""
    if case.transform == "vmap" or case.transform == "vmap_grad":
        mapped = "".join(x for x in "qkvmbs" if _chance(rng, 0.5)) or "q"
        case = replace(case, extras=(*case.extras, f"mapped={mapped}"))
    if case.subject == "function":
        return _odd(rng, _seedless(case)) if _chance(rng, 0.05) else _odd(rng, case)
    plain = {"return_lse": False, "deterministic": False, "bias": False, "dropout": 0.0, "kv_block": case.q_block}
    if case.subject == "parts":
        masks = {"mask": "none", "transform": "backward", "return_lse": True, "v_dim": case.head_dim}
        masks |= {"bias": case.bias, "dropout": case.dropout, "loss": "weighted"}
        sizes = {name: max(getattr(case, name), 1) for name in ("batch", "q_len", "kv_len")}
        return replace(case, **{**plain, **masks, **sizes})
    case = replace(case, grad_of=case.grad_of.replace("b", ""))
    if case.pattern in ("random", "empty"):
        plain["pattern"] = "bigbird"
    if case.subject == "base" and _chance(rng, 0.2):
        return _seedless(replace(case, **plain))
    if case.subject == "multihead":
        plain |= {"kv_heads": case.heads, "v_dim": case.head_dim, "segments": 0, "scale": None, "grad_of": "qkv"}
        plain |= {"magnitude": min(case.magnitude, 1.0)}
    if case.subject == "adaptive":
        plain |= {"v_dim": case.head_dim, "batch": max(case.batch, 1), "scale": None, "transform": "backward"}
        plain |= {"q_len": max(case.q_len, 1), "kv_len": max(case.kv_len, 1), "strides": "contiguous"}
        plain |= {"magnitude": 1.0, "grad_of": "qkv"}
    return replace(case, **plain)
