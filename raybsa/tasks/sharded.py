"""ShardedTraining: one rank of the byte language model's training when its sequence is split across ranks.

Every rank holds all weights and its part of every window. A step has two halves: ``prepare`` makes and exchanges the
gradients and changes nothing that lasts, ``apply`` changes the weights. So a step whose exchange broke can be made
again, and gives the same bits.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from raybsa.comm import Communicator, Phase
from raybsa.gradients.catalog import build
from raybsa.gradients.codec import Codec
from raybsa.gradients.exchange import GradientExchange
from raybsa.gradients.overlap import Overlap, OverlapMeter
from raybsa.ring.sequence import ShardedSequence
from raybsa.spec import TrialSpec
from raybsa.tasks.byte_lm import ByteText
from raybsa.tasks.model import Transformer
from raybsa.tasks.training import cross_entropy, descend, learning_rates, make_optimizer, prepare
from raybsa.variants.distributed import DistributedConfig, share_partition
from raybsa.variants.selector import selector_loss, set_schedules

BUCKET_BYTES = 2**20  # as DDP's first; a small model has several, so that some go while backward runs


class ShardedTraining:
    """The training of a TrialSpec's model, on one rank.

    Args:
        spec: task "byte_lm" with the variant "distributed" in every layer.
        device: this rank's.
        config: how ranks share the sequence.
        codec: how gradients travel: a codec of ``raybsa.gradients``, its spec or its name.
        warmup_steps: steps at the start whose gradients travel uncompressed.
        bucket_bytes: gradients that travel in one message.

    Attributes:
        step: steps applied so far.
        overlap: how much of the gradients' travel lay within backward, since it was last taken.
        losses: (step, nats a token) of the steps applied since the list was last taken, over all ranks.

    Raises:
        ValueError: another task or variant.
    """

    def __init__(
        self,
        spec: TrialSpec,
        device: torch.device,
        config: DistributedConfig | None = None,
        *,
        codec: Codec | Mapping[str, Any] | str = "none",
        warmup_steps: int = 0,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        variants = {layer.variant for layer in spec.attention}
        if spec.task != "byte_lm" or variants != {"distributed"}:
            raise ValueError(
                f"training over ranks takes task 'byte_lm' with variant 'distributed', got {spec.task!r} and {variants}"
            )
        self.spec, self.config = spec, config or DistributedConfig()
        self.text = ByteText(spec, device)
        self.model, self._context = prepare(Transformer(spec, 256), device, spec.dtype)
        self.optimizer = make_optimizer(self.model, spec.learning_rate)
        self._rates = list(learning_rates(spec.train_steps, spec.learning_rate))
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self._prepared_loss: float | None = None
        self._codec, self._warmup_steps = build(codec), warmup_steps
        self._bucket_bytes, self.overlap, self._meter = bucket_bytes, Overlap(), OverlapMeter()
        self._gradients: Communicator | None = None
        self._exchange: GradientExchange | None = None
        self._remembered: dict[int, dict[str, Any]] = {}  # what the codec keeps, as of that many applied steps
        _fill_in_state(self.optimizer)
        self.bind(Communicator(device=device))

    def bind(self, communicator: Communicator, gradients: Communicator | None = None) -> None:
        """Gives the rank its group, again after each rebuild; a step that was prepared before is forgotten.

        Args:
            gradients: of a second group of the same ranks, on which gradients travel while backward runs; without it
                they travel after backward, since two threads must not send on the ring's own group.
        """
        partition = share_partition(self.model, communicator, self.spec.train_len, self.spec.num_heads, self.config)
        self.sequence = ShardedSequence(partition, communicator)
        self._prepared_loss = None
        if self._exchange is not None:
            self._exchange.close()
        self._exchange, self._gradients, self._meter = None, gradients, OverlapMeter()
        if gradients is not None:
            gradients.observer = self._meter

    @property
    def communicator(self) -> Communicator:
        return self.sequence.communicator

    def prepare(self) -> None:
        """Makes the gradients of the next step, summed over ranks; the same bits on every rank."""
        if self._exchange is None:
            self._exchange = self._new_exchange()
        before = self._exchange.state_dict()
        tokens, targets = self.text.batches(self.step)
        set_schedules(self.model, self.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=False)
        with self.communicator.phase(Phase.STEP, "forward"), self._context:
            nats = self._nats(tokens, targets) / targets.numel()
        with self.communicator.phase(Phase.STEP, "backward"):
            (nats + selector_loss(self.model)).backward()
        backward_end_s = time.perf_counter()
        with self.communicator.phase(Phase.EXCHANGE, "gradient"):
            self._exchange.finish()
            self._remembered = {self.step: before, self.step + 1: self._exchange.state_dict()}
            self.overlap += self._meter.take(backward_end_s)
            self._prepared_loss = float(self.communicator.all_reduce("loss", nats.detach().double().view(1)))

    def apply(self) -> None:
        """Changes the weights by the gradients that ``prepare`` made."""
        assert self._prepared_loss is not None, "prepare comes first"
        with self.communicator.phase(Phase.COMMIT):
            pass
        self.optimizer.param_groups[0]["lr"] = self._rates[self.step]
        descend(self.model, self.optimizer)
        self.losses.append((self.step, self._prepared_loss))
        self.step, self._prepared_loss = self.step + 1, None

    @torch.no_grad()
    def evaluate(self) -> float:
        """Bits per held-out byte, over all ranks."""
        self.model.eval()
        total = torch.zeros(1, dtype=torch.float64, device=self.text.device)
        tokens, targets = self.text.held_out()
        for some, wanted in zip(tokens.split(8), targets.split(8), strict=True):
            with self._context:
                total += self._nats(some, wanted)
        return float(self.communicator.all_reduce("evaluation", total)) / targets.numel() / math.log(2)

    def state(self) -> list[Tensor]:
        """Every tensor that lasts, in one order on all ranks: weights, and the optimizer's moments and counts."""
        return [*(p.data for p in self.model.parameters()), *_moments(self.optimizer)]

    def digest(self) -> str:
        """A hash of every tensor that lasts: equal where training led to the same bits."""
        state = hashlib.sha256()
        for tensor in self.state():
            state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return state.hexdigest()[:32]

    def _nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """This rank's sum over its part of (B, S) windows."""
        logits = self.model(self.sequence.shard(tokens), self.sequence)
        return cross_entropy(logits, self.sequence.shard(targets), reduction="sum")

    def _new_exchange(self) -> GradientExchange:
        """The exchange of a new generation. Residuals of the steps that last go on; a newcomer begins without. What all
        ranks must hold alike (PowerSGD's warm start) begins anew, as newcomers have none."""
        exchange = GradientExchange(
            self.model.named_parameters(),
            self._codec,
            self._gradients or self.communicator,
            bucket_bytes=self._bucket_bytes,
            mean=False,
            warmup_steps=self._warmup_steps,
            overlap=self._gradients is not None,
        )
        saved = self._remembered.get(self.step, exchange.state_dict())
        states = {name: {**state, "memory": {}} for name, state in saved["states"].items()}
        exchange.load_state_dict({**saved, "step": self.step, "states": states})
        return exchange

    def residual_norm(self) -> float:
        """The Euclidean norm of the gradients that this rank has not sent yet."""
        return 0.0 if self._exchange is None else self._exchange.residual_norm()


def send_state(training: ShardedTraining, source: int, needy: Iterable[int]) -> None:
    """Copies ``source``'s state and step to the ``needy`` ranks, rank to rank. Every rank of the group calls it."""
    communicator, tensors = training.communicator, training.state()
    step = torch.tensor([training.step], dtype=torch.float64, device=communicator.device)
    needy = set(needy) - {source}
    if communicator.rank != source and communicator.rank not in needy:
        communicator.exchange("state", {}, {}).wait()
        return
    flat = (x.reshape(-1).view(torch.uint8).to(communicator.device) for x in tensors)  # AdamW counts on the CPU
    packed = torch.cat([step.view(torch.uint8), *flat])
    sends = dict.fromkeys(needy, packed) if communicator.rank == source else {}
    receives = {source: packed} if communicator.rank in needy else {}
    communicator.exchange("state", sends, receives).wait()
    if receives:
        head, *parts = packed.split([step.nbytes, *(x.nbytes for x in tensors)])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view_as(tensor))
        training.step = int(head.clone().view(torch.float64))


def _fill_in_state(optimizer: torch.optim.AdamW) -> None:
    """Makes the moments at once, as zeros, so that every rank has the same tensors before its first step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
            optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _moments(optimizer: torch.optim.AdamW) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield from (optimizer.state[p][name] for name in ("step", "exp_avg", "exp_avg_sq"))
