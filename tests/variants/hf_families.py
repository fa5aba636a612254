"""Which families of transformers attend as asked: every one that can be built small from its config is tried.

    python -m tests.variants.hf_families docs/huggingface.md    # writes the table there (some ten minutes)
    python -m tests.variants.hf_families bloom llama            # says what happens to these

A family is *served* where, over all blocks, it computes what it computes with 'eager' (plain, padded left and right;
so it is as causal as that), no softmax over tokens is left beside ours, and few blocks change its outcome.
"""

from __future__ import annotations

import copy
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from raybsa.variants.hf import HFAttention, register
from raybsa.variants.source import FixedPattern
from tests.variants.hf_tiny import VOCAB, tiny

TOKENS, OTHERS, PADDED = 40, 25, 7  # of the (decoder's) sequence, of the encoder's, and how many of it are padding
HEADS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT")
ORDER = ("served", "refused", "none", "WRONG", "not tried")
REASONS = (
    (r"do not ask transformers' attention interface", "its layers do not ask transformers' attention interface"),
    (r"look the name up in a table of their own", "its layers look the name up in a table of their own"),
    (r"attends by itself, by (.+?)\. Load", "a layer attends by itself, by {0}"),
    (r"raybsa serves no (.+?);", "raybsa serves no {0}"),
    (r"one that itself reads it", "the model itself reads the mask"),
    (r"a batch without padding was wanted", "but no padding, as the model itself reads the mask"),
    (r"^no attention", ""),
    (r"^'eager' itself|^its config|million parameters|no finite", "it does not run that small"),
)
LARGEST = 30_000_000  # parameters
SECONDS = 60
FRAMES = 512  # of sound
TABLE = re.compile(r"(<!-- families -->\n).*?(<!-- /families -->)", re.DOTALL)


class Left(TorchFunctionMode):
    """Attention beside ours: softmaxes over tokens and torch's own attention."""

    lengths = (TOKENS, OTHERS, 1)

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.ours = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if not Counted.inside and (
            name == "scaled_dot_product_attention" or (name == "softmax" and self._tokens(args[0]))
        ):
            self.found.add(name)
        return func(*args, **(kwargs or {}))

    def _tokens(self, x: Tensor) -> bool:
        return x.dim() >= 3 and x.shape[-1] in (TOKENS, OTHERS) and x.shape[-2] in (TOKENS, OTHERS)


class Counted:
    """Calls of ours, and whether one is at work."""

    inside = 0
    calls = 0

    @classmethod
    @contextmanager
    def counting(cls) -> Any:
        attend = HFAttention.__call__

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            cls.calls += 1
            cls.inside += 1
            try:
                return attend(self, *args, **kwargs)
            finally:
                cls.inside -= 1

        HFAttention.__call__ = counted
        try:
            yield
        finally:
            HFAttention.__call__ = attend


def inputs_of(model: Any, side: str | None = None) -> Iterator[dict[str, Any]]:
    """Inputs by one of which the model may run: its main one, with a picture too, or sound the other way round."""
    given = main_input(model, side)
    yield given
    if "input_ids" in given:
        yield given | {"pixel_values": picture(model.config)}
    if "input_features" in given:
        yield {"input_features": given["input_features"].transpose(1, 2)}


def first_outcome(model: Any) -> tuple[dict[str, Any], Tensor]:
    """The first inputs by which it runs, and what comes out."""
    *others, last = inputs_of(model)
    for given in others:
        try:
            return given, outcome(model, given)
        except Exception:  # it wants other inputs
            continue
    return last, outcome(model, last)


def picture(config: Any) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(2)
    return torch.rand(2, getattr(vision, "num_channels", 3), height, width, generator=generator)


def main_input(model: Any, side: str | None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        return {name: picture(config)}
    if name == "input_values":
        return {name: torch.randn(2, 16000, generator=generator)}
    if name == "input_features":
        return {name: torch.randn(2, getattr(config, "num_mel_bins", 16), FRAMES, generator=generator)}
    both = bool(getattr(config, "is_encoder_decoder", False))
    length = OTHERS if both else TOKENS
    given = {"input_ids": torch.randint(5, VOCAB - 20, (2, length), generator=generator)}
    if both:
        given["decoder_input_ids"] = torch.randint(5, VOCAB - 20, (2, TOKENS), generator=generator)
    if side is not None:
        given["attention_mask"] = torch.ones(2, length, dtype=torch.int64)
        given["attention_mask"][0, slice(0, PADDED) if side == "left" else slice(length - PADDED, length)] = 0
        if not both:
            given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return given


def outcome(model: Any, given: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    given = dict(given)
    if "position_ids" not in model.forward.__code__.co_varnames:
        given.pop("position_ids", None)
    with torch.no_grad():
        found = model(**given)
    for name in ("logits", "last_hidden_state", "prediction_logits"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    return next(x for x in found.to_tuple() if isinstance(x, Tensor) and x.is_floating_point())


def counted(out: Tensor, given: dict[str, Any]) -> Tensor:
    mask = given.get("attention_mask")
    return out[mask.bool()] if mask is not None and out.shape[:2] == mask.shape else out


def build(cls: Any, config: Any, name: str) -> Any:
    torch.manual_seed(0)
    return cls._from_config(copy.deepcopy(config), attn_implementation=name).eval()


def differ(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)).item()


def verdict(cls: Any, config: Any) -> tuple[str, str]:
    """("served", "refused", "not tried" or "WRONG", why)."""
    try:
        with torch.device("meta"):
            size = sum(
                p.numel() for p in cls._from_config(copy.deepcopy(config), attn_implementation="eager").parameters()
            )
        if size > LARGEST:
            return "not tried", f"{size / 1e6:.0f} million parameters at its smallest here"
        theirs = build(cls, config, "eager")
        states = {
            k: (torch.randn_like(v) * 0.2 if v.dim() > 1 and v.is_floating_point() else v)
            for k, v in theirs.state_dict().items()
        }
        theirs.load_state_dict(states)
        plain, wanted = first_outcome(theirs)
    except Exception as error:  # of any kind: it is transformers' or the tiny config's, and it is shown
        refused = why_refused(cls, config)
        return ("refused", refused) if refused else ("not tried", f"'eager' itself: {words(error)}")
    if not torch.isfinite(wanted).all():
        return "not tried", "'eager' itself: no finite numbers"
    try:
        ours = build(cls, config, "raybsa-all")
        ours.load_state_dict(states)
        Counted.calls = 0
        with Left() as left:
            found = outcome(ours, plain)
    except NotImplementedError as error:
        return "refused", words(error)
    except TimeoutError:
        raise
    except Exception as error:
        return "WRONG", f"raises {words(error)}"
    if differ(found, wanted) > 1e-3:
        sdpa = build(cls, config, "sdpa")
        sdpa.load_state_dict(states)
        if differ(found, outcome(sdpa, plain)) < 1e-3:
            return "served", "as with 'sdpa', which itself differs from 'eager'"
        return "WRONG", f"over all blocks it differs from 'eager' by {differ(found, wanted):.1e}"
    if left.found:
        return "WRONG", f"beside ours there is {', '.join(sorted(left.found))}"
    if not Counted.calls:
        return "none", "no attention"
    try:
        few = build(cls, config, "raybsa-few")
        few.load_state_dict(states)
        if differ(outcome(few, plain), wanted) < 1e-5:
            return "served", "over all blocks, as cross-attention"  # asked for so, and nothing is left beside it
    except NotImplementedError as error:
        return "refused", words(error)
    except Exception as error:
        return "WRONG", f"sparse, raises {words(error)}"
    return padded(theirs, ours)


def padded(theirs: Any, ours: Any) -> tuple[str, str]:
    if ours.main_input_name != "input_ids":
        return "served", ""
    for side in ("right", "left"):
        given = main_input(theirs, side)
        try:
            wanted = outcome(theirs, given)
        except Exception:  # it takes no such mask
            continue
        try:
            found = outcome(ours, given)
        except NotImplementedError as error:
            return "served", f"but padded: {words(error)}"
        except Exception as error:
            return "WRONG", f"padded {side}, raises {words(error)}"
        if side == "left" and wanted.shape[:2] != given["attention_mask"].shape and not ours.config.is_encoder_decoder:
            continue  # an outcome of the first token, which is padding
        off = differ(counted(found, given), counted(wanted, given))
        if not off < 1e-3:
            return "WRONG", f"padded {side} it differs from 'eager' by {off:.1e}"
    return "served", ""


def why_refused(cls: Any, config: Any) -> str | None:
    try:
        with torch.device("meta"):
            build(cls, config, "raybsa-all")
    except NotImplementedError as error:
        return words(error) if "raybsa" in str(error) else None
    except Exception:  # not built either way
        return None
    return None


def words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
    return kind + text[:300]


@contextmanager
def limited(seconds: int) -> Any:
    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def families(names: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """Family, class, verdict and words of each model that transformers' auto classes make of a family's config."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    mappings = [getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in HEADS]
    for family in names or sorted(CONFIG_MAPPING.keys()):
        known = [mapping.get(family, ()) for mapping in (*mappings, modeling_auto.MODEL_MAPPING_NAMES)]
        classes = dict.fromkeys(name for names in known for name in ((names,) if isinstance(names, str) else names))
        for name in classes:
            if hasattr(transformers, name):
                yield family, name, *tried(getattr(transformers, name), CONFIG_MAPPING[family])


def tried(cls: Any, config_class: Any) -> tuple[str, str]:
    try:
        with limited(SECONDS):
            return verdict(cls, tiny(config_class))
    except Exception as error:  # its config takes other sizes, or it takes too long
        return "not tried", f"its config: {words(error)}"


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """What happens, and to which families; a family whose classes differ is named by these."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for family, name, what, why in rows:
        groups.setdefault((what, reason(why)), {}).setdefault(family, []).append(name)
    of_family = {family: sum(row[0] == family for row in rows) for family, *_ in rows}
    lines = ["| what happens | families |", "|---|---|"]
    for (what, why), members in sorted(groups.items(), key=lambda group: (ORDER.index(group[0][0]), group[0][1])):
        named = [
            family if len(names) == of_family[family] else f"{family} ({', '.join(names)})"
            for family, names in members.items()
        ]
        lines.append(f"| {what}{why and ': ' + why} | {', '.join(named)} |")
    return "\n".join(lines)


def reason(why: str) -> str:
    """The words of a message that families share."""
    for pattern, short in REASONS:
        found = re.search(pattern, why)
        if found:
            return short.format(*found.groups())
    return why.replace("|", "/")


def register_both() -> None:
    """The names "raybsa-all", over all blocks, and "raybsa-few"."""
    register(FixedPattern("dense", block_size=8, causal=True), "raybsa-all")
    few = FixedPattern({"name": "sliding_window", "params": {"window": 8}}, block_size=8, causal=True)
    register(few, "raybsa-few", cross_attention="dense")


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    register_both()
    document = Path(arguments[0]) if arguments and arguments[0].endswith(".md") else None
    rows = []
    with Counted.counting():
        for row in families([] if document else arguments):
            print(*row, sep="\t", flush=True)
            rows.append(row)
    if document is not None:
        document.write_text(TABLE.sub(lambda marks: f"{marks[1]}{table(rows)}\n{marks[2]}", document.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
