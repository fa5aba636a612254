"""BlockSelector: the LayoutSource that learns. It looks at q and k and says which blocks each query block keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from raybsa.cache import LayoutCache
from raybsa.kernels.call import AttentionCall
from raybsa.kernels.ordinary import check_numbers_at_hand
from raybsa.layout import BlockLayout
from raybsa.patterns.blocks import save_blocks
from raybsa.patterns.parameters import integer
from raybsa.patterns.pattern import check_density
from raybsa.selectors.choice import Choice
from raybsa.selectors.coarse import coarse_attention
from raybsa.selectors.compare import compare, compare_whole
from raybsa.selectors.distill import rows_divergence, sampled_rows
from raybsa.selectors.gate import Gate
from raybsa.selectors.mask_blocks import with_infinity
from raybsa.selectors.pooling import block_stats
from raybsa.selectors.recompute import Passes
from raybsa.selectors.rules import Rules, segment_pairs
from raybsa.selectors.schedule import Schedule
from raybsa.selectors.selection import mean_columns
from raybsa.selectors.shape import Shape
from raybsa.selectors.visibility import Visibility
from raybsa.spec import PatternSpec
from raybsa.variants.selection import Selection

METHODS = ("distill", "bias", "compressed", "mean-pool")


class BlockSelector(nn.Module):
    """Chooses blocks by pooled q and k, one choice a sample and KV head, which its query heads share.

    All rows keep the same number of blocks, as far as they have candidates, with the density exact in total:
    the diagonal, sinks and a local window first, then the best by the gate. A causal row chooses by the tokens before
    its own block and its first token, so no output depends on a later token. Samples do not influence each other, nor
    do tokens that masks hide from one another: ``Visibility`` says what a row may look at then.

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
        sinks, window, max_blocks: as in ``Rules``.
        top_p: keep no more of a row's free blocks than hold this share of the gate's probability, in (0, 1]; rows then
            keep at most their number. Reads sizes back from a GPU. None: no cap.
        warmup, anneal: training steps at density 1, and from there to ``density``.
        temperature: (at the start, at the end) of the gate's softmax and sigmoid; goes with ``warmup`` and ``anneal``.
        sample_rows: query blocks a call whose whole attention is distilled.
        sharpness: the power to which a query's attention of a block is taken before it is distilled, at least 1; above
            1, queries that look at few blocks count more.
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
        sinks: int = Rules.sinks,
        window: int = Rules.window,
        max_blocks: int | None = Rules.max_blocks,
        top_p: float | None = None,
        warmup: int = 0,
        anneal: int = 0,
        temperature: Sequence[float] = (1.0, 1.0),
        sample_rows: int = 16,
        sharpness: float = 4.0,
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
        if not sharpness >= 1.0:
            raise ValueError(f"sharpness must be at least 1, got {sharpness!r}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.method, self.top_p, self.seed = method, top_p, seed
        self.sample_rows, self.sharpness = sample_rows, float(sharpness)
        segments = segment_pairs(segment_lengths, dilation_rates)
        self.rules = Rules(block_size, bool(causal), segments, sinks, window, max_blocks)
        self.density = Schedule(1.0 if warmup or anneal else check_density(density), density, warmup, anneal)
        self.temperature = Schedule(temperature[0], temperature[1], warmup, anneal)
        learns = method != "mean-pool"
        self.gate = Gate(kv_heads, num_heads // kv_heads, head_dim, min(gate_dim, head_dim)) if learns else None
        self.share = nn.Parameter(torch.full((num_heads,), -2.0)) if method == "compressed" else None
        self.passes = Passes()
        self._cache: LayoutCache[Shape] = LayoutCache()

    # ---- a LayoutSource ---------------------------------------------------------------------------------------------

    @property
    def causal(self) -> bool:
        """Whether no choice keeps a block above the diagonal, nor looks at a later token."""
        return self.rules.causal

    @property
    def distills(self) -> bool:
        """Whether ``complete`` keeps a loss for ``selector_loss``."""
        return self.method == "distill" and self.training and not torch.is_inference_mode_enabled()

    def select(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None = None,
        segment_ids: tuple[Tensor, Tensor] | None = None,
    ) -> Selection:
        """The layout for q (B, H, Sq, D) and k (B, Hkv, Skv, D), a group for each sample and head (one in all where
        everything is kept), the bias (nnz,) of the method ``"bias"``, and ``attn_mask`` with -inf for what it hides.

        Nothing that the masks hide from a token decides on what its row keeps (``Visibility``).

        Raises:
            ValueError, TypeError: tensors or masks that do not fit.
            NotImplementedError: tensors without numbers to choose by, or a copy that ``nn.DataParallel`` trains.
        """
        q, k = self._seen("q", q, self.num_heads), self._seen("k", k, self.num_kv_heads)
        plain = attn_mask is None and segment_ids is None
        visible = None if plain else Visibility.of(self.content, self.rules, q, k, attn_mask, segment_ids)
        u, w = compare_whole(self.gate, q, k, self.rules, visible)
        found = self._keep(u, w, self._shape(q.shape[2], k.shape[2], self.density.value, q.device), visible)
        return found if attn_mask is None else found._replace(attn_mask=with_infinity(attn_mask))

    def query_stats(self, q: Tensor, taken: Tensor | None = None) -> Tensor:
        """(B, H, n, 3, D) what the gate sees of q, of the tokens ``taken`` as in ``block_stats``; without a gradient
        where the method gives it none."""
        return block_stats(self._seen("q", q, self.num_heads), self.rules.block_size, taken)

    def key_stats(self, k: Tensor, taken: Tensor | None = None) -> Tensor:
        """(B, Hkv, n, 3, D) the same of k."""
        return block_stats(self._seen("k", k, self.num_kv_heads), self.rules.block_size, taken)

    def choose(
        self, own: Tensor, before: Tensor | None, keys: Tensor, shape: Shape, visible: Visibility | None = None
    ) -> Selection:
        """The layout and bias of the shape's rows, which may be a part of the sequence's.

        Args:
            own, before: of these rows' blocks and of those before them, as in ``query_features``.
            keys: ``key_stats`` of all of k.
            visible: what these rows may look at; None: all.
        """
        rows = None if shape.is_whole else shape.rows
        return self._keep(*compare(self.gate, own, before, keys, self.rules, rows, visible), shape, visible)

    def complete(self, selection: Selection, call: AttentionCall, out: Tensor) -> Tensor:
        """The output after what the method does to it. Where it ``distills`` it keeps the loss of the choice, and ties
        the output to the gate that the loss trains (``Passes``)."""
        choice: Choice = selection.choice
        if self.share is not None:
            u, size = choice.u / self.temperature.value, self.rules.block_size
            coarse = coarse_attention(u, choice.w, call.v, size, call.q.shape[2], self.rules.causal, choice.visible)
            share = torch.sigmoid(self.share)[:, None, None]
            return out + (share * coarse.repeat_interleave(call.queries_per_kv, 1)).to(out.dtype)
        if not self.distills:
            return out
        this = self.passes.begin()
        with torch.autocast(out.device.type, enabled=False):
            loss = self._distill(choice, call, this.number)
        return self.passes.end(this, out, loss, self.parameters())

    def layout(self, q_len: int, kv_len: int, num_heads: int, device: torch.device) -> BlockLayout:
        """A layout with the work of any choice: as many blocks in every row, the nearest ones."""
        return self._shape(q_len, kv_len, self.density.end, device).nearest()

    # ---- training ---------------------------------------------------------------------------------------------------

    def selector_loss(self) -> Tensor:
        """() what to add to the loss of the last forward: nats of KL under ``"distill"`` in training, else 0.

        Of a forward without gradients it is the value alone, unless a reentrant checkpoint computes that forward anew.
        """
        loss = self.passes.loss()
        if loss is not None:
            return loss
        return torch.zeros((), device="cpu" if self.gate is None else self.gate.key.device)

    def complete_shard(
        self, selection: Selection, out: Tensor, mass: Tensor, total: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As ``complete`` where it ``distills``, over ranks: keeps this rank's part of the loss.

        Args:
            mass: (nnz,) of the selected blocks of this rank's rows, at this ``sharpness``.
            total: () of this rank -> () the sum over all ranks.
        """
        this = self.passes.begin()
        part, weight = selection.choice.divergence(mass, self.temperature.value)
        return self.passes.end(this, out, part / total(weight), self.parameters())

    def divergence(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """() nats of KL between the whole attention of a few sampled rows and the gate: to train the gate alone.

        Args:
            q, k: (B, H, Sq, D) and (B, Hkv, Skv, D), not differentiated.
            scale: factor on the scores of the attention.
        """
        q, k = q.detach(), k.detach()
        u, w = self._compare(q, k)
        rows = self._draw_rows(u, self.passes.number())
        return rows_divergence(u, w, q, k, scale, self.rules, rows, self.temperature.value, sharpness=self.sharpness)

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
        best = mean_columns(*self._compare(q, k), shape, self.temperature.end)
        return shape.layout(shape.columns_of(best), self.num_heads // self.num_kv_heads, transient=False)

    def freeze_to(self, path: str, q: Tensor, k: Tensor) -> PatternSpec:
        """Saves ``freeze(q, k)`` in a Parquet file; the pattern ``blocks`` that reads it, for this geometry."""
        return save_blocks(self.freeze(q, k), path).spec

    # ---- for ourselves ----------------------------------------------------------------------------------------------

    def _seen(self, name: str, x: Tensor, heads: int) -> Tensor:
        """``x``, checked; without a gradient where the method gives it none."""
        check_numbers_at_hand("a learned selection", x)
        if self.training and self.method == "distill" and getattr(self, "_is_replica", False):
            raise NotImplementedError(
                "torch.nn.DataParallel trains copies of this module, whose selector_loss is lost: use "
                "DistributedDataParallel, or the method 'bias' or 'compressed'"
            )
        if x.shape[1] != heads or x.shape[3] != self.head_dim:
            raise ValueError(f"the selector is for {name} (B, {heads}, S, {self.head_dim}), got {tuple(x.shape)}")
        return x.detach() if self.method == "distill" else x

    @property
    def content(self) -> int:
        """How many numbers of u and w, the first ones, tell of what is in the blocks."""
        return self.head_dim if self.gate is None else self.gate.key.shape[-1]

    def _compare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, Hkv, num_q_blocks, d) and w (B, Hkv, num_kv_blocks, d)."""
        q, k = self._seen("q", q, self.num_heads), self._seen("k", k, self.num_kv_heads)
        return compare_whole(self.gate, q, k, self.rules)

    def _shape(self, q_len: int, kv_len: int, density: float, device: torch.device) -> Shape:
        key = (q_len, kv_len, density, device)
        return self._cache.get(key, lambda: Shape.make(self.rules, q_len, kv_len, density, device))

    def _keep(self, u: Tensor, w: Tensor, shape: Shape, visible: Visibility | None = None) -> Selection:
        self.passes.forget()
        copies, temperature = self.num_heads // self.num_kv_heads, self.temperature.value
        if self.density.value == 1.0 and self.rules.max_blocks is None:
            choice = Choice.of_all(u, w, shape, copies, visible, apart=self.method == "bias" or not shape.is_whole)
        else:
            choice = Choice.of_best(u, w, shape, copies, self.top_p, temperature, visible)
        return Selection(choice.layout, choice.bias(temperature) if self.method == "bias" else None, choice)

    def _distill(self, choice: Choice, call: AttentionCall, number: int) -> Tensor:
        """() nats of sampled rows."""
        rows, masks = self._draw_rows(choice.u, number), (call.attn_mask, call.segment_ids, choice.visible)
        found = (choice.u, choice.w, call.q, call.k, call.scale, self.rules, rows, self.temperature.value)
        return rows_divergence(*found, *masks, self.sharpness)

    def _draw_rows(self, u: Tensor, number: int) -> Tensor:
        """Rows of blocks, others in each forward."""
        return sampled_rows(u.shape[2], self.sample_rows, self.seed + number, u.device)

    def extra_repr(self) -> str:
        heads = f"{self.num_heads}" if self.num_heads == self.num_kv_heads else f"{self.num_heads}/{self.num_kv_heads}"
        cap = "" if self.top_p is None else f", top_p={self.top_p:g}"
        return f"heads={heads}, head_dim={self.head_dim}, method={self.method!r}{cap}, {self.rules}"


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
