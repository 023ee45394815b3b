"""One optimizer step on a list of micro-batches, taken by all ranks together."""

import hashlib
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from shardrec.modules.item_counts import ItemCounts
from shardrec.modules.losses import Loss, Step
from shardrec.modules.option_checks import (
    require_above_zero,
    require_at_least,
    require_betas,
    require_choice,
)
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.model.profile_ranges import part
from shardrec.pipeline.prepared.loader import Batch
from shardrec.pipeline.ranks import rank_of, size_of, sum_over_ranks

__all__ = ["OptimizerConfig", "StepOutcome", "Stepper", "Votes", "learning_rate_factor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How encoder and table are updated; the table's own options are those of the catalog.

    Attributes:
        learning_rate: of the encoder; the table's is ``catalog.learning_rate``.
        betas: decay of Adam's two moments.
        eps: added to the root in Adam's update.
        weight_decay: of the encoder, decoupled (AdamW).
        warmup_steps: steps over which both learning rates rise from 0.
        decay: after warm-up, "constant" or "cosine" (to 0 at the last step of the run).
        clip_norm: largest norm of the gradient over encoder and table together; None: no limit.
        accumulate: batches whose gradients make one step, as if they were one batch.
        max_skipped: consecutive steps with a loss or gradient that is not finite before giving up.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    clip_norm: float | None = None
    accumulate: int = 1
    max_skipped: int = 10

    def __post_init__(self) -> None:
        """Refuse numbers that no run can use."""
        for name, least in (("accumulate", 1), ("max_skipped", 1), ("warmup_steps", 0)):
            require_at_least(f"optimizer.{name}", getattr(self, name), least)
        require_at_least("optimizer.learning_rate", self.learning_rate, 0, "give e.g. 1e-3")
        require_at_least("optimizer.weight_decay", self.weight_decay, 0, "0 turns it off")
        # With 0 a weight whose gradient is 0 would become 0 / 0.
        require_above_zero("optimizer.eps", self.eps, "give e.g. 1e-8")
        require_above_zero("optimizer.clip_norm", self.clip_norm, "none turns it off")
        require_betas("optimizer.betas", self.betas)
        require_choice("optimizer.decay", self.decay, ("constant", "cosine"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Votes:
    """What a rank says before a step, and what all ranks know after it.

    Attributes:
        stop: the run is to end after this step; one rank is enough.
        save: a checkpoint is to follow this step; one rank is enough.
        interrupt: after this step and a checkpoint the run is to stop where it is; one rank is
            enough.
        written: the checkpoint under way is written; it takes all ranks.
    """

    stop: bool = False
    save: bool = False
    interrupt: bool = False
    written: bool = False


NO_VOTES = Votes()
_Begun = tuple[Batch, Callable[[], Tensor]]  # on the device; gives the vectors


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What one step came to, the same on every rank (see ``StepReport``)."""

    loss: float
    gradient_norm: float
    learning_rate: float
    positions: int
    slots: int
    skipped: bool
    votes: Votes
    memory_bytes: int
    statistics: Mapping[str, float]


class Stepper:
    """Forward, backward, clip, update: the only place that changes the weights."""

    def __init__(
        self,
        model: Model,
        loss: Loss,
        config: OptimizerConfig,
        *,
        seed: int,
        total_steps: int | None,
        item_counts: Tensor | None = None,
    ) -> None:
        """Store the parts and make the encoder's optimizer.

        Args:
            model: encoder and catalog.
            loss: called with the states and the table shard.
            config: learning rates, clipping, accumulation.
            seed: of dropout and of what the loss draws.
            total_steps: of the whole run; cosine decay ends there.
            item_counts: (V,) int64 training events of each item, for the loss.
        """
        if config.decay == "cosine" and total_steps is None:
            raise ValueError(
                "optimizer.decay must be 'constant' where the length of the run is not known, got "
                "'cosine'; set limits.max_steps or limits.max_epochs"
            )
        self.model = model
        self.loss = loss
        self.config = config
        self.seed = seed
        self.total_steps = total_steps
        self.item_counts = None if item_counts is None else ItemCounts(item_counts)
        self._ahead: tuple[Batch, _Begun] | None = None
        self.parameters = [one for one in model.encoder.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [{"params": self.parameters}],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def take(
        self,
        batches: Sequence[Batch],
        step: int,
        votes: Votes = NO_VOTES,
        following: Batch | None = None,
    ) -> StepOutcome:
        """Take step number ``step``, counted from 1.

        Args:
            batches: this rank's parts of as many global batches on every rank.
            step: names the random draws; every step takes another number.
            votes: of this rank.
            following: the first batch of the next call, on every rank or on none: its ids travel
                during the backward of this step.

        Returns:
            The same outcome on every rank.

        Collectives: one reduction of a few numbers, those of look-up and loss, one reduction of the
        encoder's gradients.
        """
        self.model.encoder.train()
        torch.manual_seed(self._dropout_seed(step))
        totals = self._agree(batches, votes)
        losses, statistics = self._backward(batches, step, totals, following)
        with part("gradients over ranks"):
            norm = self._reduce_gradients()
        finite = math.isfinite(norm) and math.isfinite(losses)
        factor = learning_rate_factor(step, self.config, self.total_steps)
        with part("update"):
            self._update(norm, factor, finite)
        return StepOutcome(
            loss=losses,
            gradient_norm=norm,
            learning_rate=self.config.learning_rate * factor,
            positions=sum(totals.positions),
            slots=totals.slots,
            skipped=not finite,
            votes=totals.votes,
            memory_bytes=totals.memory_bytes,
            statistics=statistics,
        )

    def _agree(self, batches: Sequence[Batch], votes: Votes) -> "_Totals":
        """What must be known of all ranks before the step."""
        rank, world_size = rank_of(self.model.group), size_of(self.model.group)
        memory = [0.0] * world_size
        memory[rank] = float(_memory_bytes(self.model.device))
        weights = [_weight(batch) for batch in batches]
        positions = [float(batch.lengths.sum()) for batch in batches]
        slots = float(sum(batch.items.numel() for batch in batches))
        said = [float(one) for one in (votes.stop, votes.save, votes.interrupt, votes.written)]
        mine = [*weights, *positions, slots, *said, *memory]
        values = torch.tensor(mine, dtype=torch.float64, device=self.model.device)
        sum_over_ranks(values, self.model.group)
        count, total = len(batches), values.tolist()
        stop, save, interrupt, written = total[2 * count + 1 : 2 * count + 5]
        return _Totals(
            weights=total[:count],
            positions=[int(value) for value in total[count : 2 * count]],
            slots=int(total[2 * count]),
            votes=Votes(
                stop=stop > 0,
                save=save > 0,
                interrupt=interrupt > 0,
                written=written == world_size,
            ),
            memory_bytes=int(max(total[2 * count + 5 :])),
        )

    def _backward(
        self, batches: Sequence[Batch], step: int, totals: "_Totals", following: Batch | None
    ) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss over all micro-batches; the mean, and its statistics.

        Data whose weights are not finite have no mean: NaN, and no gradients.
        """
        if not math.isfinite(sum(totals.weights)):
            return math.nan, {}
        mean, statistics = 0.0, dict[str, float]()
        coming = [*batches[1:], following]
        for index, (batch, after) in enumerate(zip(batches, coming, strict=True)):
            if not totals.positions[index]:
                continue
            share = totals.weights[index] / (sum(totals.weights) or 1.0)
            draw = Step(
                seed=self.seed,
                step=(step - 1) * self.config.accumulate + index,
                item_counts=self.item_counts,
            )
            batch, vectors = self._begun(batch)
            real = batch.real_positions()
            states = self.model.states(batch.items, batch.lengths, vectors)
            # Backward in two calls, so that a profile tells the loss from the encoder.
            seen = states.detach().requires_grad_()
            with part("loss"):
                output = self.loss(
                    seen,
                    self.model.catalog.shard,
                    batch.targets.reshape(-1)[real],
                    weights=None if batch.weights is None else batch.weights.reshape(-1)[real],
                    step=draw,
                )
            if after is not None:
                with part("next ids"):
                    self._ahead = after, self._begin(after)
            with part("loss backward"):
                (output.loss * share).backward()
            with part("encoder backward"):
                states.backward(seen.grad)
            mean += float(output.loss.detach()) * share
            for name, value in output.statistics.items():
                statistics[name] = statistics.get(name, 0.0) + value * share
        return mean, statistics

    def _begin(self, batch: Batch) -> "_Begun":
        there = batch.to(self.model.device)
        return there, self.model.begin_lookup(there.items, there.lengths)

    def _begun(self, batch: Batch) -> "_Begun":
        """The batch on the device, its ids sent during the backward before or now."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] is batch else self._begin(batch)

    def _reduce_gradients(self) -> float:
        """Sum the encoder's gradients over ranks; the norm over encoder and table.

        A gradient of one rank is that of the global mean loss already: nothing is averaged.
        """
        table = self.model.catalog.squared_gradient_norm().reshape(1)
        parts = [_gradient(one).reshape(-1) for one in self.parameters]
        flat = torch.cat([*parts, table])
        sum_over_ranks(flat, self.model.group)
        for parameter, gradient in zip(
            self.parameters, flat[:-1].split([one.numel() for one in self.parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)
        return float((flat[:-1].square().sum() + flat[-1]).sqrt())

    def _update(self, norm: float, factor: float, finite: bool) -> None:
        """Apply the gradients, clipped, or drop them."""
        catalog, limit = self.model.catalog, self.config.clip_norm
        if finite:
            scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
            for parameter in self.parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(scale)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * factor
            self.optimizer.step()
            catalog.step(scale, catalog.config.learning_rate * factor)
        self.optimizer.zero_grad()
        catalog.zero_grad()

    def _dropout_seed(self, step: int) -> int:
        """Dropout is a function of (seed, step, rank), so that a resumed run repeats it."""
        text = f"dropout {self.seed} {step} {rank_of(self.model.group)}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Totals:
    """Sums over the ranks, one entry a micro-batch in the lists."""

    weights: list[float]
    positions: list[int]
    slots: int
    votes: Votes
    memory_bytes: int


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int | None) -> float:
    """The share of the full learning rates that step number ``step``, counted from 1, uses.

    Example:
        >>> config = OptimizerConfig(warmup_steps=2, decay="cosine")
        >>> [round(learning_rate_factor(step, config, 6), 2) for step in range(1, 7)]
        [0.5, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.decay == "constant" or total_steps is None:
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _weight(batch: Batch) -> float:
    """What the loss divides its sum by."""
    if batch.weights is None:
        return float(batch.lengths.sum())
    return float(batch.weights.reshape(-1)[batch.real_positions()].double().sum())


def _memory_bytes(device: torch.device) -> int:
    """Peak memory of the GPU in use, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the memory of the parent that started us
        peak = next(line for line in status.open() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
