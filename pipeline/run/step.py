"""Take one optimizer step on a list of micro-batches, on all ranks together."""

import contextlib
import functools
import hashlib
import math
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.shard import RowShard
from shardrec.modules.item_counts import ItemCounts
from shardrec.modules.length_groups import num_slots
from shardrec.modules.loss import Batch as LossBatch
from shardrec.modules.losses import Loss, Step
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.model.profile_ranges import part
from shardrec.pipeline.prepared.loader import Batch
from shardrec.pipeline.ranks import on_all_ranks
from shardrec.pipeline.run.average import AveragedWeights
from shardrec.pipeline.run.config import OptimizerConfig

__all__ = ["StepFlags", "StepOutcome", "Stepper", "learning_rate_factor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlags:
    """Per-rank control flags, all-reduced before each step.

    Attributes:
        stop: end the run after this step, if any rank sets it.
        save: write a checkpoint after this step, if any rank sets it.
        interrupt: write a checkpoint after this step and stop, if any rank sets it.
        written: the checkpoint in flight is written, if all ranks set it.
    """

    stop: bool = False
    save: bool = False
    interrupt: bool = False
    written: bool = False


NO_FLAGS = StepFlags()
LARGEST_WEIGHT = 1e36  # of all positions of a step, so that float32 holds weight times loss
_InFlight = tuple[Batch, Callable[[], Tensor]]  # on the device; gives the vectors


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """Loss, gradient norm and counts of one step, the same on every rank; see ``StepReport``."""

    loss: float
    gradient_norm: float
    learning_rate: float
    positions: int
    slots: int
    skipped: bool
    flags: StepFlags
    memory_bytes: int
    statistics: Mapping[str, float]


class Stepper:
    """Takes optimizer steps: forward, backward, clipping, update of encoder and table."""

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
        """Store the parts and make the optimizer of the encoder and of attributes.

        Args:
            model: encoder and catalog.
            loss: called with the states and the table shard.
            config: learning rates, clipping, accumulation.
            seed: seed of dropout and of the random draws of the loss.
            total_steps: steps of the whole run, after which cosine decay reaches 0.
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
        self.average: AveragedWeights | None = None
        self._ahead: tuple[Batch, _InFlight] | None = None
        replicated = [*model.encoder.parameters(), *model.catalog.attributes.parameters()]
        self.parameters = [one for one in replicated if one.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [{"params": self.parameters}],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=model.device.type == "cuda" or None,
        )

    def start_average(self) -> None:
        """Average the weights from now on, if the config asks for it."""
        decay, every = self.config.ema_decay, self.config.ema_every
        if decay:
            catalog, parameters = self.model.catalog, list[Tensor](self.parameters)
            self.average = AveragedWeights(parameters, catalog, decay=decay, every=every)

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Context manager: the model holds the averaged weights, if there are any."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Load the state of the optimizer, which another kind of device may have written."""
        fused = self.optimizer.defaults["fused"]
        groups = [group | {"fused": fused} for group in state["param_groups"]]
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})

    def take(
        self,
        batches: Sequence[Batch],
        step: int,
        flags: StepFlags = NO_FLAGS,
        following: Batch | None = None,
    ) -> StepOutcome:
        """Take one optimizer step; if loss or gradient are not finite, no weights change.

        Args:
            batches: this rank's parts of as many global batches on every rank; of R replicas,
                replica r has sequences in batches r, r + R, … alone.
            step: number of the step, counted from 1; seeds the random draws.
            flags: of this rank.
            following: this replica's first batch of the next call, on all of its ranks or none;
                its ids are sent during the backward pass of this step.

        Returns:
            The same outcome on every rank.

        Collectives: an all-reduce of a few numbers, the collectives of look-up and loss, an
        all-reduce of the encoder's gradients.
        """
        self.model.encoder.train()
        torch.manual_seed(self._dropout_seed(step))
        self.model.catalog.begin_step(self.seed, step)
        totals = self._reduce_totals(batches, flags)
        losses, statistics = self._over_replicas(*self._backward(batches, step, totals, following))
        with part("gradients over ranks"):
            norm = self._reduce_gradients()
        finite = math.isfinite(norm) and math.isfinite(losses)
        factor = learning_rate_factor(step, self.config, self.total_steps)
        with part("update"):
            self._update(norm, factor, finite)
            if self.average is not None:
                self.average.update(step)
        return StepOutcome(
            loss=losses,
            gradient_norm=norm,
            learning_rate=self.config.learning_rate * factor,
            positions=sum(totals.positions),
            slots=totals.slots,
            skipped=not finite,
            flags=totals.flags,
            memory_bytes=totals.memory_bytes,
            statistics=statistics,
        )

    def weights_are_finite(self) -> bool:
        """Whether the norms of all weights are finite in float32; the same on every rank.

        Collectives: an all-reduce of one number.
        """
        weights = [self.model.catalog.state_dict()["rows"], *self.parameters]
        norms = [torch.linalg.vector_norm(one.detach()) for one in weights]
        total = torch.stack([norm.float() for norm in norms]).sum().reshape(1)
        Communicator(self.model.group).sum_(total)
        return math.isfinite(float(total))

    def _reduce_totals(self, batches: Sequence[Batch], flags: StepFlags) -> "_Totals":
        """All-reduce flags, counts and weights of the step."""
        ranks = Communicator(self.model.group)
        rank, world_size = ranks.rank, ranks.size
        memory = [0.0] * world_size
        memory[rank] = float(_memory_bytes(self.model.device))
        weights = [_weight(batch) for batch in batches]
        positions = torch.zeros(world_size, len(batches), dtype=torch.float64)
        positions[rank] = torch.tensor([batch.num_positions for batch in batches])
        slots = float(sum(num_slots(batch.lengths) for batch in batches))
        raised = [float(one) for one in (flags.stop, flags.save, flags.interrupt, flags.written)]
        local = [*weights, slots, *raised, *memory, *positions.flatten().tolist()]
        values = torch.tensor(local, dtype=torch.float64, device=self.model.device)
        Communicator(self.model.group).sum_(values)
        count, total = len(batches), values.tolist()
        stop, save, interrupt, written = total[count + 1 : count + 5]
        positions = torch.tensor(total[count + 5 + world_size :]).long().view(world_size, count)
        return _Totals(
            weights=total[:count],
            positions=positions.sum(0).tolist(),
            first=positions[:rank].sum(0).tolist(),
            slots=int(total[count]),
            flags=StepFlags(
                stop=stop > 0,
                save=save > 0,
                interrupt=interrupt > 0,
                written=written == world_size,
            ),
            memory_bytes=int(max(total[count + 5 : count + 5 + world_size])),
        )

    def _backward(
        self, batches: Sequence[Batch], step: int, totals: "_Totals", following: Batch | None
    ) -> tuple[float, dict[str, float]]:
        """Gradients of the mean loss over all micro-batches; the mean, and its statistics.

        Where float32 cannot hold the sum of the data's weights there is no mean: NaN, and no
        gradients.
        """
        if not sum(totals.weights) <= LARGEST_WEIGHT:
            return math.nan, {}
        mean, statistics = 0.0, dict[str, float]()
        own = self._own_batches(batches)
        coming = [*(batches[index] for index in own[1:]), following]
        for index, after in zip(own, coming, strict=False):
            batch = batches[index]
            if not totals.positions[index]:
                continue
            share = totals.weights[index] / (sum(totals.weights) or 1.0)
            draw = Step(
                seed=self.seed,
                step=(step - 1) * self.config.accumulate + index,
                item_counts=self.item_counts,
            )
            batch, vectors = self._in_flight(batch)
            real = batch.real_positions()
            keys = self._dropout_keys(draw.step, totals.first[index], len(real))
            states = self.model.states(batch.items, batch.lengths, vectors, keys)
            # Backward in two calls, so that a profile separates the loss from the encoder.
            seen = states.detach().requires_grad_()
            targets = batch.targets.reshape(-1)[real]
            weights = None if batch.weights is None else batch.weights.reshape(-1)[real]
            with part("loss"):
                asked = functools.partial(self._used_rows, seen, targets, weights, draw)
                shard = self.model.catalog.shard_for(asked)
                with self.model.autocast():
                    output = self.loss(seen, shard, targets, weights=weights, step=draw)
            if after is not None:
                with part("next ids"):
                    self._ahead = after, self._start_lookup(after)
            with part("loss backward"):
                (output.loss * share).backward()
            with part("encoder backward"):
                states.backward(seen.grad)
            mean += float(output.loss.detach()) * share
            for name, value in output.statistics.items():
                statistics[name] = statistics.get(name, 0.0) + value * share
        return mean, statistics

    def _own_batches(self, batches: Sequence[Batch]) -> range:
        """The indices of the micro-batches of this replica."""
        replicas = self.model.catalog.replicas
        if replicas is None:
            return range(len(batches))
        own = range(replicas.index, len(batches), replicas.count)
        others = [batch for index, batch in enumerate(batches) if index not in own]
        assert not any(len(batch.lengths) for batch in others), "each batch is of one replica"
        return own

    def _over_replicas(
        self, mean: float, statistics: dict[str, float]
    ) -> tuple[float, dict[str, float]]:
        """The sums of loss and statistics over the replicas, in their order."""
        replicas = self.model.catalog.replicas
        if replicas is None:
            return mean, statistics
        found = on_all_ranks(lambda: (mean, statistics), replicas.group)
        names = dict.fromkeys(name for _, told in found for name in told)
        sums = {name: sum(told.get(name, 0.0) for _, told in found) for name in names}
        return sum(one for one, _ in found), sums

    def _used_rows(
        self, states: Tensor, targets: Tensor, weights: Tensor | None, draw: Step, shard: RowShard
    ) -> Tensor | None:
        """The rows of the shard that the loss will read."""
        return self.loss.used_rows(LossBatch(states, shard, targets, weights, draw))

    def _start_lookup(self, batch: Batch) -> "_InFlight":
        there = batch.to(self.model.device)
        ids = there.items.reshape(-1)[there.real_positions()]
        return there, self.model.catalog.begin_lookup(ids)

    def _in_flight(self, batch: Batch) -> "_InFlight":
        """The batch on the device, with its look-up in flight; started before, or else now."""
        ahead, self._ahead = self._ahead, None
        return ahead[1] if ahead is not None and ahead[0] is batch else self._start_lookup(batch)

    def _reduce_gradients(self) -> float:
        """All-reduce the gradients of encoder and attributes; the norm over them and the table.

        Each rank's gradient belongs to the global mean loss already, so they are summed.
        """
        table = self.model.catalog.squared_gradient_norm().reshape(1)
        parts = [_gradient(one).reshape(-1) for one in self.parameters]
        flat = torch.cat([*parts, table])
        Communicator(self.model.group).sum_(flat)
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
            if self.parameters:
                torch._foreach_mul_([_gradient(one) for one in self.parameters], scale)
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * factor
            self.optimizer.step()
            catalog.step(scale, catalog.config.learning_rate * factor)
        self.optimizer.zero_grad()
        catalog.zero_grad()

    def _dropout_seed(self, step: int) -> int:
        """A seed from (seed, step, rank), so that a resumed run repeats its dropout."""
        return _hashed(f"dropout {self.seed} {step} {Communicator(self.model.group).rank}", 4)

    def _dropout_keys(self, draw: int, first: int, number: int) -> Tensor:
        """(number,) int64 keys of positions, from (seed, draw, index in the global batch)."""
        start = _hashed(f"dropout {self.seed} {draw}", 7) + first
        return torch.arange(start, start + number, device=self.model.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Totals:
    """Sums over the ranks, one entry a micro-batch in the lists; ``first`` is over those before."""

    weights: list[float]
    positions: list[int]
    first: list[int]
    slots: int
    flags: StepFlags
    memory_bytes: int


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int | None) -> float:
    """The factor in [0, 1] by which both learning rates are multiplied at ``step``, from 1 on.

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


def _hashed(text: str, num_bytes: int) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=num_bytes).digest()
    return int.from_bytes(digest, "little")


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _weight(batch: Batch) -> float:
    """The sum of weights of a batch, by which the loss is divided."""
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
