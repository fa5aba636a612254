"""Selection: block scores a tile of rows at a time, and of each row the best columns. Memory is O(N), never n * n."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from raybsa.selectors.pooling import runs_kernels
from raybsa.selectors.rules import Rules
from raybsa.selectors.shape import Shape
from raybsa.selectors.topk import top_columns
from raybsa.selectors.visibility import Visibility

TILE_SCORES = {"cpu": 2**20, "cuda": 2**24}  # block scores at hand at one time


@torch.no_grad()
def best_columns(u: Tensor, w: Tensor, shape: Shape, visible: Visibility | None = None) -> Tensor:
    """(B, Hkv, rows, widest) int64: each row's columns in order of preference, forced ones first, hidden ones last.

    Args:
        u: (B, Hkv, rows, d) of the shape's rows.
        w: (B, Hkv, columns, d); block scores are ``u @ w.T``.
        shape: which rows, and how many columns the widest keeps.
        visible: what the rows may look at; None: all.
    """
    best = torch.empty(*u.shape[:3], shape.widest, dtype=torch.int64, device=u.device)
    for place, scores, hidden in score_tiles(u, w, visible):
        best[:, :, place] = top_columns(shape.rules.preferences(scores, shape.rows[place], hidden), shape.widest)
    return best


@torch.no_grad()
def kept_columns(u: Tensor, w: Tensor, shape: Shape, visible: Visibility | None = None) -> Tensor:
    """(B * Hkv, m) int32: of each row the columns that it keeps, ascending, row after row; as ``best_columns`` has
    them. On a GPU a product and one kernel a tile, where there are no masks."""
    if visible is not None or not (runs_kernels(u) and shape.rules.segments is None):
        return shape.columns_of(best_columns(u, w, shape, visible))
    from raybsa.selectors.triton_select import MAX_COLUMNS, choose

    if shape.columns > MAX_COLUMNS:
        return shape.columns_of(best_columns(u, w, shape))
    out = torch.empty(u.shape[0] * u.shape[1], len(shape.row), dtype=torch.int32, device=u.device)
    for place, scores, _ in score_tiles(u.float(), w.float()):
        choose(scores.flatten(0, 1), shape, place.start, out)
    return out


@torch.no_grad()
def within_share(
    u: Tensor,
    w: Tensor,
    shape: Shape,
    best: Tensor,
    share: float,
    temperature: float,
    visible: Visibility | None = None,
) -> Tensor:
    """(B, Hkv, rows, widest) bool: the choices before which the row has less than ``share`` of its free probability.

    Free are the candidates that are not forced; forced choices are always wanted, hidden ones only where a row has no
    others. The probabilities are the softmax of the scores over ``temperature``.
    """
    wanted = torch.empty_like(best, dtype=torch.bool)
    for place, scores, hidden in score_tiles(u, w, visible):
        chosen, settled = best[:, :, place], settled_blocks(shape.rules, shape.rows[place], w.shape[2])
        settled = settled if hidden is None else settled | hidden
        odds = (scores.float() / temperature).masked_fill(settled, float("-inf")).softmax(-1).nan_to_num(0.0)
        chances = odds.gather(-1, chosen)
        before = chances.cumsum(-1) - chances
        forced = settled.expand_as(odds).gather(-1, chosen)
        kept = forced | (before < share)
        if hidden is not None:
            kept &= ~hidden.expand_as(odds).gather(-1, chosen)
            kept[..., 0] = True  # no row is empty
        wanted[:, :, place] = kept
    return wanted


@torch.no_grad()
def mean_columns(u: Tensor, w: Tensor, shape: Shape, temperature: float) -> Tensor:
    """(1, Hkv, rows, widest) int64: as ``best_columns``, by the mean over samples of what each gives to the blocks."""
    best = torch.empty(1, *u.shape[1:3], shape.widest, dtype=torch.int64, device=u.device)
    for place, odds in mean_probabilities(u, w, shape, temperature):
        best[:, :, place] = top_columns(shape.rules.preferences(odds, shape.rows[place]), shape.widest)
    return best


@torch.no_grad()
def mean_probabilities(u: Tensor, w: Tensor, shape: Shape, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Places of rows and (1, Hkv, R, columns): the free blocks' probabilities, mean over samples."""
    for place, scores, _ in score_tiles(u, w):
        settled = settled_blocks(shape.rules, shape.rows[place], w.shape[2])
        odds = (scores.float() / temperature).masked_fill(settled, float("-inf")).softmax(-1).nan_to_num(0.0)
        yield place, odds.mean(0, keepdim=True)


def score_tiles(
    u: Tensor, w: Tensor, visible: Visibility | None = None
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Places of rows, their scores (B, Hkv, R, columns) and the hidden pairs among them, bool, None without masks: a
    tile at a time, in the type of ``u`` whatever autocast says, as rounded scores would tie."""
    step = max(1, TILE_SCORES.get(u.device.type, 2**24) // (u.shape[0] * u.shape[1] * w.shape[2]))
    for begin in range(0, u.shape[2], step):
        place = slice(begin, min(begin + step, u.shape[2]))
        with torch.autocast(u.device.type, enabled=False):
            scores = u[:, :, place] @ w.transpose(-1, -2)
            hidden = None
            if visible is not None:
                scores, hidden = visible.scores(scores, u[:, :, place], w, place)
        yield place, scores, hidden


def settled_blocks(rules: Rules, rows: Tensor, columns: int) -> Tensor:
    """(R, columns) bool: what leaves the rows no choice, forced or no candidate."""
    found = rules.settled(rows[:, None], torch.arange(columns, device=rows.device), columns)
    return found if rules.segments is None else found | ~rules.candidates(rows, columns)
