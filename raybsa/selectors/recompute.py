"""What a forward in training leaves for the loss, so that checkpoints and DDP do to it what they do to an output.

The loss of a choice does not come out of the forward: ``selector_loss`` asks for it afterwards. A *reentrant*
checkpoint runs the forward without gradients, and once more within the backward: the loss of the first pass has no
graph. So it is given with a backward that only writes down the weight which the whole loss has for it, and the second
pass hands that weight to the loss of its own graph, from the output's backward. Autograd runs first what was made last,
so the weight is known by then.

The second pass knows the first by a *ticket*: a number from torch's default CPU generator, which checkpoints rewind. So
it distills the same rows, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor


class Pass:
    """One forward in training; it lives as long as its output's or its loss's graph.

    Attributes:
        number: how many came before it; says which rows are distilled.
        weight: () what a backward has for the loss, until a recomputation took it.
        task: the backward in which it was last recomputed.
        missed: it was recomputed before there was a weight.
    """

    def __init__(self, number: int, earlier: Pass | None) -> None:
        self.number = number
        self.weight: Tensor | None = None
        self.task = -1
        self.missed = False
        self._earlier = None if earlier is None else ref(earlier)

    def of_one_ticket(self) -> Iterable[Pass]:
        """This pass and those before it that drew the same ticket, as after ``torch.manual_seed``."""
        found: Pass | None = self
        while found is not None:
            yield found
            found = None if found._earlier is None else found._earlier()


class Passes:
    """The passes of one selector. A copy or a pickle starts anew.

    Attributes:
        count: forwards so far, recomputations left out.
    """

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self._known: WeakValueDictionary[int, Pass] = WeakValueDictionary()
        self._stranger = -1  # the last backward in which a forward was recomputed that is not known
        self._last: tuple[Pass, Tensor] | None = None

    def __reduce__(self) -> tuple[type[Passes], tuple[int]]:
        return type(self), (self.count,)

    def begin(self) -> Pass:
        """The pass that begins, or of which this is the recomputation. To be called once in each forward."""
        ticket = self._ticket()
        known = self._known.get(ticket)
        if (task := current_backward()) != -1:
            return self._again(known, task)
        self._known[ticket] = begun = Pass(self.number(), known)
        return begun

    def _ticket(self) -> int:
        return int(torch.randint(2**63 - 1, (), device="cpu"))

    def number(self) -> int:
        """How many forwards came before; counts this one."""
        self.count += 1
        return self.count - 1

    def end(self, this: Pass, out: Tensor, loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        """``out``, tied to ``parameters``, which the loss trains; of a recomputation also to the loss."""
        if current_backward() == -1:
            self._last = this, loss
            return _Tie.apply(out, this, None, *parameters) if torch.is_grad_enabled() else out
        if not torch.is_grad_enabled():  # an outer checkpoint's recomputation, of which an inner one begins
            return out
        weight, this.weight = this.weight, None
        this.missed = weight is None
        return _Tie.apply(out, this, weight, *(parameters if weight is None else (loss,)))

    def forget(self) -> None:
        """A forward begins; a recomputation leaves what is known of the last one."""
        if current_backward() == -1:
            self._last = None

    def loss(self) -> Tensor | None:
        """() the loss of the last forward; None where it has none."""
        if self._last is None:
            return None
        this, loss = self._last
        if loss.requires_grad or not torch.is_grad_enabled():
            return loss
        owed = _Owed.apply(loss.new_zeros(()).requires_grad_(), loss, this, self)
        assert isinstance(owed, Tensor)
        return owed

    def _again(self, known: Pass | None, task: int) -> Pass:
        """The pass whose recomputation begins. Of one ticket those come first that have a weight, then those not yet
        recomputed in this backward, and the last before the others, as backward goes."""
        found = [] if known is None else list(known.of_one_ticket())
        if not found:
            self._stranger = task
            return Pass(self.count, None)
        this = min(found, key=lambda each: (each.weight is None, each.task == task))
        if torch.is_grad_enabled():
            this.task = task
        return this

    def check_paid(self, this: Pass, task: int) -> None:
        """Raises RuntimeError at the end of a backward whose weight for a loss was not taken, though there was a
        recomputation that should have."""
        if this.weight is not None and (this.missed or self._stranger == task):
            this.weight = None
            raise RuntimeError(
                "a selector_loss got its gradient, but its forward was recomputed without: under a reentrant "
                "checkpoint selector_loss must be part of the loss of the same backward as the output, and the "
                "checkpoint needs preserve_rng_state=True"
            )


def current_backward() -> int:
    """The number of the backward that runs in this thread; -1 where none does."""
    return torch._C._current_graph_task_id()


class _Tie(torch.autograd.Function):
    """The output as it is. Its backward gives ``weight``, nothing where it is None, to all after it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, this: Pass, weight: Tensor | None, *tied: Tensor) -> Tensor:
        ctx.this, ctx.weight, ctx.count = this, weight, len(tied)
        return out.detach()  # which may be written to, as any output; itself it would be a view that may not

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, *(ctx.weight,) * ctx.count


class _Owed(torch.autograd.Function):
    """The loss of a pass without a graph. Its backward writes down the weight."""

    @staticmethod
    def forward(ctx: Any, tail: Tensor, loss: Tensor, this: Pass, passes: Passes) -> Tensor:
        ctx.this, ctx.passes = this, passes
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        this, passes, task = ctx.this, ctx.passes, current_backward()
        this.weight = grad if this.weight is None else this.weight + grad
        torch.autograd.Variable._execution_engine.queue_callback(lambda: passes.check_paid(this, task))
        return None, None, None, None
