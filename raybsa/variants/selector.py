"""BlockSelector: the LayoutSource that learns. It looks at q and k and says which blocks each query block keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from raybsa.kernels.call import AttentionCall
from raybsa.kernels.mass import block_mass
from raybsa.layout import BlockLayout
from raybsa.patterns.blocks import save_blocks
from raybsa.patterns.dilated import Dilated
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import check_density
from raybsa.selectors.coarse import coarse_attention
from raybsa.selectors.distill import divergence, sampled_rows
from raybsa.selectors.entries import Entries, Table
from raybsa.selectors.gate import Gate, position_waves
from raybsa.selectors.pooling import block_stats, blocks_before, key_features, query_features, runs_kernels
from raybsa.selectors.row_mass import row_mass
from raybsa.selectors.rules import Rules
from raybsa.selectors.schedule import Schedule
from raybsa.selectors.selection import best_columns, kept_columns, mean_probabilities, settled_blocks, within_share
from raybsa.selectors.shape import Shape
from raybsa.selectors.topk import top_columns
from raybsa.spec import PatternSpec
from raybsa.variants.cache import LayoutCache

Method = Literal["distill", "bias", "compressed", "mean-pool"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True, eq=False)
class _Choice:
    """What one ``select`` chose, and by what: u and w as ``Gate`` gives them, the layouts of KV heads and of all."""

    u: Tensor
    w: Tensor
    shape: Shape
    by_kv_head: BlockLayout
    layout: BlockLayout
    dense: bool


class BlockSelector(nn.Module):
    """Chooses blocks by pooled q and k, one choice a sample and KV head, which its query heads share.

    Each row keeps ``max(1, round(density * allowed))`` blocks (no more than there are candidates): the diagonal, sinks
    and a local window first, then the best by the gate. A causal row chooses by the tokens before its own block and
    its first token, so no output depends on a later token. Samples do not influence each other.

    What trains the gate is ``method``:

    - ``"distill"``: KL between the attention's own mass and the gate, from ``selector_loss``. q and k are detached.
    - ``"bias"``: the log of a sigmoid of the score is added to the scores of its kept block (not the diagonal): the
      task's own gradient, exact, reaches gate, q and k through the kept blocks, and none through the others.
    - ``"compressed"``: attention over mean values of blocks, with the gate's scores, is added to the output through a
      learned factor a head: the task's own gradient, exact, through all blocks before the row's.
    - ``"mean-pool"``: no parameters; the product of mean queries and mean keys.

    Args:
        num_heads, head_dim: of q.
        num_kv_heads: of k; None: ``num_heads``.
        segment_lengths, dilation_rates: lists of equal length that bound the candidates, as in the pattern
            ``dilated``; None: every allowed block is one.
        density: share of the allowed blocks to keep, in (0, 1].
        block_size: tokens, a power of two.
        causal: keep no block above the diagonal.
        method: as above.
        gate_dim: numbers that the gate compares, at most ``head_dim``.
        sinks, window, max_blocks, even: as in ``Rules``.
        top_p: keep no more of a row's free blocks than hold this share of the gate's probability, in (0, 1]; rows then
            keep at most their number. Reads sizes back from a GPU. None: no cap.
        warmup, anneal: training steps at density 1, and from there to ``density``.
        temperature: (at the start, at the end) of the gate's softmax and sigmoid; goes with ``warmup`` and ``anneal``.
        sample_rows: query blocks a call whose whole attention is distilled.
        seed: which rows these are.

    Attributes:
        density, temperature: ``Schedule`` objects, stepped by ``step``; their state is in ``state_dict``.
        gate: the parameters.

    Raises:
        ValueError: a number out of range, or an unknown method.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        segment_lengths: Sequence[int] | None = None,
        dilation_rates: Sequence[int] | None = None,
        density: float = 0.1,
        block_size: int = 64,
        causal: bool = False,
        method: str = "distill",
        gate_dim: int = 32,
        sinks: int = 0,
        window: int = 2,
        max_blocks: int | None = None,
        even: bool = True,
        top_p: float | None = None,
        warmup: int = 0,
        anneal: int = 0,
        temperature: Sequence[float] = (1.0, 1.0),
        sample_rows: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("num_heads", num_heads), ("num_kv_heads", kv_heads), ("head_dim", head_dim)):
            integer(name, value)
        if num_heads % kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {kv_heads}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {top_p!r}")
        integer("sample_rows", sample_rows)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.method, self.top_p, self.sample_rows, self.seed = method, top_p, sample_rows, seed
        segments = _pairs(segment_lengths, dilation_rates)
        self.rules = Rules(block_size, bool(causal), segments, sinks, window, max_blocks, even)
        self.density = Schedule(1.0 if warmup or anneal else check_density(density), density, warmup, anneal)
        self.temperature = Schedule(temperature[0], temperature[1], warmup, anneal)
        learns = method != "mean-pool"
        self.gate = Gate(kv_heads, num_heads // kv_heads, head_dim, min(gate_dim, head_dim)) if learns else None
        self.share = nn.Parameter(torch.full((num_heads,), -2.0)) if method == "compressed" else None
        self.calls = 0
        self._cache: LayoutCache[Shape] = LayoutCache()
        self._places: LayoutCache[Tensor] = LayoutCache()
        self._choice: _Choice | None = None
        self._loss: Tensor | None = None

    # ---- a LayoutSource ---------------------------------------------------------------------------------------------

    @property
    def causal(self) -> bool:
        """Whether no choice keeps a block above the diagonal, nor looks at a later token."""
        return self.rules.causal

    @property
    def wants_lse(self) -> bool:
        """Whether ``complete`` will need the attention's lse."""
        return self._distills

    def select(self, q: Tensor, k: Tensor) -> tuple[BlockLayout, Tensor | None]:
        """The layout for q (B, H, Sq, D) and k (B, Hkv, Skv, D), a group for each sample and head (one in all where
        everything is kept), and the bias (nnz,) of the method ``"bias"``."""
        self._check("q", q, self.num_heads)
        self._check("k", k, self.num_kv_heads)
        return self._keep(*self._compare_whole(q, k), self._shape(q.shape[2], k.shape[2], self.density.value, q.device))

    def query_stats(self, q: Tensor) -> Tensor:
        """(B, H, n, 3, D) what the gate sees of q; without a gradient where the method gives it none."""
        self._check("q", q, self.num_heads)
        return block_stats(q.detach() if self.method == "distill" else q, self.rules.block_size)

    def key_stats(self, k: Tensor) -> Tensor:
        """(B, Hkv, n, 3, D) the same of k."""
        self._check("k", k, self.num_kv_heads)
        return block_stats(k.detach() if self.method == "distill" else k, self.rules.block_size)

    def choose(
        self, own: Tensor, before: Tensor | None, keys: Tensor, shape: Shape
    ) -> tuple[BlockLayout, Tensor | None]:
        """The layout and bias of the shape's rows, which may be a part of the sequence's.

        Args:
            own, before: of these rows' blocks and of those before them, as in ``query_features``.
            keys: ``key_stats`` of all of k.
        """
        return self._keep(*self._compare(own, before, keys, None if shape.is_whole else shape.rows), shape)

    def _keep(self, u: Tensor, w: Tensor, shape: Shape) -> tuple[BlockLayout, Tensor | None]:
        copies, groups = self.num_heads // self.num_kv_heads, len(u) * self.num_kv_heads
        dense = self.density.value == 1.0 and self.rules.max_blocks is None
        if dense:
            apart = self.method == "bias" or not shape.is_whole
            by_kv_head = shape.everything(groups) if apart else shape.dense
            layout = shape.everything(groups * copies) if apart and copies > 1 else by_kv_head
        else:
            by_kv_head, layout = self._sparse(u, w, shape, copies)
        self._choice, self._loss = _Choice(u, w, shape, by_kv_head, layout, dense), None
        return layout, self._bias(self._choice, copies) if self.method == "bias" else None

    def take_loss_of_shard(self, mass: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Keeps this rank's part of the loss over ranks, from the mass (nnz,) of the blocks that it chose last.

        Args:
            total: () of this rank -> () the sum over all ranks.
        """
        choice, self._choice = self._choice, None
        assert choice is not None, "choose comes first"
        part, weight = self._kept_divergence(choice, mass)
        self._loss = part / total(weight)

    def complete(self, call: AttentionCall, out: Tensor, lse: Tensor | None) -> Tensor:
        """The output after what the method does to it. Told of the attention (``lse`` (B, H, Sq) where ``wants_lse``),
        it keeps the loss of the choice that it made last."""
        choice, self._choice = self._choice, None
        assert choice is not None, "select comes first"
        if self.share is not None:
            coarse = coarse_attention(
                choice.u / self.temperature.value,
                choice.w,
                call.v,
                self.rules.block_size,
                call.q.shape[2],
                self.rules.causal,
            ).repeat_interleave(call.queries_per_kv, 1)
            return out + (torch.sigmoid(self.share)[:, None, None] * coarse).to(out.dtype)
        if self._distills and lse is not None:
            with torch.autocast(out.device.type, enabled=False):
                self._loss = self._distill(choice, call, lse.detach())
        return out

    def layout(self, q_len: int, kv_len: int, num_heads: int, device: torch.device) -> BlockLayout:
        """A layout with the work of any choice: as many blocks in every row, the nearest ones."""
        return self._shape(q_len, kv_len, self.density.end, device).nearest()

    # ---- training ---------------------------------------------------------------------------------------------------

    def selector_loss(self) -> Tensor:
        """() what to add to the loss of the last forward: nats of KL under ``"distill"`` in training, else 0."""
        return torch.zeros((), device=self._device) if self._loss is None else self._loss

    def divergence(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """() nats of KL between the whole attention of a few sampled rows and the gate: to train the gate alone.

        Args:
            q, k: (B, H, Sq, D) and (B, Hkv, Skv, D), not differentiated.
            scale: factor on the scores of the attention.
        """
        q, k = q.detach(), k.detach()
        u, w = self._compare_whole(q, k)
        return self._sampled_divergence(u, w, (q, k, scale))

    def step(self) -> None:
        """Tells the schedules that a step of training was applied."""
        self.density.step()
        self.temperature.step()

    # ---- freezing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def freeze(self, q: Tensor, k: Tensor) -> BlockLayout:
        """A fixed layout, a group a head: the blocks to which the gate gives most over the samples of q and k.

        ``freeze_to`` saves it as a pattern.
        """
        shape = self._shape(q.shape[2], k.shape[2], self.density.end, q.device)
        u, w = self._compare_whole(q, k)
        best = torch.empty(1, u.shape[1], u.shape[2], shape.widest, dtype=torch.int64, device=q.device)
        for place, odds in mean_probabilities(u, w, shape, self.temperature.end):
            best[:, :, place] = top_columns(self.rules.preferences(odds, shape.rows[place]), shape.widest)
        return shape.layout(shape.columns_of(best), self.num_heads // self.num_kv_heads, transient=False)

    def freeze_to(self, path: str, q: Tensor, k: Tensor) -> PatternSpec:
        """Saves ``freeze(q, k)`` in a Parquet file; the pattern ``blocks`` that reads it, for this geometry."""
        return save_blocks(self.freeze(q, k), path).spec

    # ---- for ourselves ----------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.gate is None else self.gate.key.device

    @property
    def _distills(self) -> bool:
        return self.method == "distill" and self.training and torch.is_grad_enabled()

    def _check(self, name: str, x: Tensor, heads: int) -> None:
        if x.shape[1] != heads or x.shape[3] != self.head_dim:
            raise ValueError(f"the selector is for {name} (B, {heads}, S, {self.head_dim}), got {tuple(x.shape)}")

    def _shape(self, q_len: int, kv_len: int, density: float, device: torch.device) -> Shape:
        key = (q_len, kv_len, density, device)
        return self._cache.get(key, lambda: Shape.make(self.rules, q_len, kv_len, density, device))

    def _compare_whole(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.gate
        if gate is not None and gate.dtype == torch.float32 and runs_kernels(q) and not torch.is_grad_enabled():
            from raybsa.selectors.triton_gate import gated

            waves = self._waves(-(-max(q.shape[2], k.shape[2]) // self.rules.block_size), q.device)
            return gated(q, k, gate, waves, self.rules.block_size, self.rules.causal)
        own, keys = self.query_stats(q), self.key_stats(k)
        before = blocks_before(own) if self.rules.causal else None
        return self._compare(own, before, keys, None)

    def _compare(self, own: Tensor, before: Tensor | None, keys: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """u (B, Hkv, rows, d) and w (B, Hkv, num_kv_blocks, d); ``rows`` None: the first ones."""
        if self.gate is None:
            mean = own[:, :, :, 0] if before is None else before[:, :, :, 0] + own[:, :, :, 2] / self.rules.block_size
            return mean.unflatten(1, (self.num_kv_heads, -1)).mean(2), keys[:, :, :, 0]
        with torch.autocast(own.device.type, enabled=False):
            features = query_features(own, before, self.num_kv_heads)
            waves = self._waves(max(own.shape[2], keys.shape[2]), keys.device)
            u = self.gate.queries(features, waves[: own.shape[2]] if rows is None else waves[rows])
            return u, self.gate.keys(key_features(keys), waves[: keys.shape[2]])

    def _waves(self, count: int, device: torch.device) -> Tensor:
        return self._places.get((count, device), lambda: position_waves(count, device))

    def _sparse(self, u: Tensor, w: Tensor, shape: Shape, copies: int) -> tuple[BlockLayout, BlockLayout]:
        """The layout of KV heads and that of query heads."""
        if self.top_p is None:
            col = kept_columns(u, w, shape)
            by_kv_head = shape.layout(col)
            return by_kv_head, by_kv_head if copies == 1 else shape.layout(col, copies)
        best = best_columns(u, w, shape)
        wanted = within_share(u, w, shape, best, self.top_p, self.temperature.value)
        by_kv_head = shape.capped_layout(best, wanted)
        return by_kv_head, by_kv_head if copies == 1 else shape.capped_layout(best, wanted, copies)

    def _bias(self, choice: _Choice, copies: int) -> Tensor:
        """(nnz,) log of each kept block's gate; 0 on the diagonal, which holds a causal row's own future."""
        entries = Entries.of(choice.by_kv_head)
        gate = nn.functional.logsigmoid(self._cooled(entries.scores(choice.u, choice.w)))
        own = self.rules.diagonal(entries.q_block, choice.shape.columns) == choice.by_kv_head.col_indices
        return entries.over_heads(gate.masked_fill(own, 0.0), copies)

    def _distill(self, choice: _Choice, call: AttentionCall, lse: Tensor) -> Tensor:
        attention = (call.q, call.k, call.scale)
        loss = self._sampled_divergence(choice.u, choice.w, attention, call.attn_mask, call.segment_ids)
        if choice.dense:
            return loss
        kept, weight = self._kept_divergence(choice, block_mass(call, lse))
        return (loss + kept / weight) / 2

    def _kept_divergence(self, choice: _Choice, mass: Tensor) -> tuple[Tensor, Tensor]:
        """``divergence`` over the kept blocks, from their mass (nnz of the query heads' layout,)."""
        table, widest = Table.of(choice.by_kv_head, choice.shape.widest), choice.shape.widest
        columns = table.take(choice.by_kv_head.col_indices)
        settled = table.beyond | self.rules.settled(table.q_block, columns, choice.shape.columns)
        mass = Table.of(choice.layout, widest).take(mass)
        if self.num_heads > self.num_kv_heads:
            mass = mass.unflatten(0, (table.beyond.shape[0], -1)).mean(1)
        return divergence(self._cooled(table.scores(choice.u, choice.w, columns)), mass, settled)

    def _sampled_divergence(
        self,
        u: Tensor,
        w: Tensor,
        attention: tuple[Tensor, Tensor, float],
        attn_mask: Tensor | None = None,
        segment_ids: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """That of a few rows, drawn anew in each call, over all their candidates.

        Args:
            attention: q, k and the factor on their products.
        """
        drawn = sampled_rows(u.shape[2], self.sample_rows, self.seed + self.calls)
        self.calls += 1
        rows = drawn.pin_memory().to(u.device, non_blocking=True) if u.is_cuda else drawn
        q, k, scale = attention
        mass = row_mass(q, k, scale, self.rules, rows, attn_mask, segment_ids)
        with torch.autocast(u.device.type, enabled=False):
            scores = self._cooled(u.index_select(2, rows) @ w.transpose(-1, -2))
        found, weight = divergence(scores, mass, settled_blocks(self.rules, rows, w.shape[2]))
        return found / weight

    def _cooled(self, scores: Tensor) -> Tensor:
        """Scores over the temperature."""
        temperature = self.temperature.value
        return scores if temperature == 1.0 else scores / temperature

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle forgets the last forward."""
        return {**self.__dict__, "_choice": None, "_loss": None}

    def extra_repr(self) -> str:
        heads = f"{self.num_heads}" if self.num_heads == self.num_kv_heads else f"{self.num_heads}/{self.num_kv_heads}"
        cap = "" if self.top_p is None else f", top_p={self.top_p:g}"
        return f"heads={heads}, head_dim={self.head_dim}, method={self.method!r}{cap}, {self.rules}"


def _pairs(lengths: Sequence[int] | None, rates: Sequence[int] | None) -> tuple[tuple[int, int], ...] | None:
    given = [name for name, x in (("segment_lengths", lengths), ("dilation_rates", rates)) if x is not None]
    if lengths is None and rates is None:
        return None
    if lengths is None or rates is None:
        raise ValueError(f"segment_lengths and dilation_rates go together, got only {given[0]}")
    rule = Dilated(tuple(lengths), tuple(rates))
    return tuple(zip(rule.segment_lengths, rule.dilation_rates, strict=True))


def selector_loss(model: nn.Module) -> Tensor | float:
    """What the selectors of a model add to the loss of its last forward; 0.0 where it has none."""
    return sum(module.selector_loss() for module in model.modules() if isinstance(module, BlockSelector))


def set_schedules(model: nn.Module, step: int) -> None:
    """Tells every schedule of a model how many steps of training were applied so far."""
    for module in model.modules():
        if isinstance(module, Schedule):
            module.count = step


def step_schedules(model: nn.Module) -> None:
    """Tells every selector of a model that a step of training was applied."""
    for module in model.modules():
        if isinstance(module, BlockSelector):
            module.step()
