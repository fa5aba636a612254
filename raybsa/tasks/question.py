"""The contract of a search over a torch module of your own: what its function returns, and how that is used."""

# Annotations are types here, not text: of a NamedTuple's texts the API reference finds no names.
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raybsa.own import own_of_file

SET_ASIDE = 8  # batches to be judged by, where the function names none


class Question(NamedTuple):
    """What ``function(seed)`` returns; a plain tuple of the three or four will do.

    It is called in the worker's process, once a trial, with the trial's seed, after ``torch.manual_seed`` of it: the
    same seed must give the same model and batches. All is made on the CPU; model and batches are moved.

    Args:
        model: moved to the worker's device and otherwise left as it is, but for the attention that a trial asks for.
        batches: to train on, one a step: tensors, or tuples, lists and mappings of them. It may be without end; what
            ends is begun again. The first batch has the same shapes whatever the seed: with it attention is timed.
        loss: (model, batch) -> (), what is minimised. It calls the model.
        held_out: a finite number of batches to be judged by, by the mean of their losses. None: the first eight of
            ``batches`` are set aside for it, and ``batches`` must have enough others for all steps.
    """

    model: nn.Module
    batches: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    held_out: Iterable[Any] | None = None


class Asked(NamedTuple):
    """A question, ready: the batches to train on (without end, or an error), the first of them, and those held out."""

    model: nn.Module
    batches: Iterator[Any]
    first: Any
    loss: Callable[[nn.Module, Any], Tensor]
    held_out: list[Any]


def ask(function: str, seed: int, device: torch.device) -> Asked:
    """Calls ``file.py:function`` with the seed; model and batches come on ``device``.

    Raises:
        ValueError: there is no such function, or it returns something else than a Question. What it raises itself goes
            through; ``batches`` and ``loss`` raise ValueError where they give what the contract excludes.
    """
    make = own_of_file(function, "the function of an own module")
    torch.manual_seed(seed)
    given = make(seed)
    if not isinstance(given, tuple) or len(given) not in (3, 4):
        raise ValueError(f"{function} must return (model, batches, loss) or these and held_out, got {_word(given)}")
    question = Question(*given)
    if not isinstance(question.model, nn.Module) or not callable(question.loss):
        raise ValueError(
            f"{function} must return (model, batches, loss, held_out) with an nn.Module and a loss(model, batch), got "
            f"({', '.join(map(_word, given))})"
        )
    batches = _endless(function, question)
    first = next(batches)
    held_out = list(question.held_out) if question.held_out is not None else [first]
    if question.held_out is None:
        held_out += [next(batches) for _ in range(SET_ASIDE - 1)]
        first = next(batches)
    if not held_out:
        raise ValueError(f"{function} must return at least one batch to be judged by, got held_out without any")

    ready = to(first, device)

    def moved() -> Iterator[Any]:
        torch.manual_seed(seed)  # whatever was timed meanwhile, dropout draws the same
        yield ready
        yield from (to(batch, device) for batch in batches)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = question.loss(model, batch)
        if not isinstance(value, Tensor) or value.dim():
            raise ValueError(f"the loss of {function} must return a tensor of no dimension, got {_word(value)}")
        return value

    return Asked(question.model.to(device), moved(), ready, loss, held_out)


def to(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``: in tuples, lists and mappings (which become dicts); else as it is."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to(value, device) for value in batch))
    return type(batch)(to(value, device) for value in batch) if isinstance(batch, tuple | list) else batch


def digest_of(batches: Any) -> str:
    """16 hex digits of the tensors and plain values in tuples, lists and mappings of them."""
    digest = hashlib.sha256()
    for value in _leaves(batches):
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, str | bytes | int | float | bool | None):
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield key
            yield from _leaves(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _leaves(value)
    else:
        yield batch


def _endless(function: str, question: Question) -> Iterator[Any]:
    """The batches, begun again where they end and that may be."""
    count, again = 0, question.held_out is not None and iter(question.batches) is not question.batches
    while True:
        before = count
        for batch in question.batches:
            count += 1
            yield batch
        if not again or count == before:
            wanted = "batches for all steps, or an iterable that can be begun again and held_out beside it,"
            raise ValueError(f"{wanted} were wanted of {function}: they ended after {count}")


def _word(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
