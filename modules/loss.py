"""The interface between losses and training: options with checks, inputs, output and cost."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor

from shardrec.kernels import RowShard
from shardrec.kernels.cost.terms import LossCost
from shardrec.kernels.label_smoothing import label_smoothing, with_label_smoothing
from shardrec.kernels.ranks.traffic import Workload
from shardrec.modules.item_counts import ItemCounts
from shardrec.modules.option_checks import (
    require_above_zero,
    require_at_least,
    require_choice,
    require_within,
)

__all__ = ["Batch", "Loss", "LossOutput", "SmoothedLoss", "Step", "check_options", "option"]


def option(default: Any, **rule: Any) -> Any:
    """A dataclass field with a default and a rule for its values.

    Args:
        default: The default of the field.
        rule: One of ``above_zero="hint"``, ``at_least=number``, ``one_of=(words)`` and
            ``within=(low, high, "hint")``. Whole numbers need no upper limit: sizes are cut to the
            number of positions or items.
    """
    return dataclasses.field(default=default, metadata=rule)


def check_options(loss: Any) -> None:
    """Raises ValueError if an option of the loss breaks its rule.

    Args:
        loss: A dataclass instance with fields from ``option``.

    Raises:
        ValueError: An option breaks its rule; the message names it as on the command line.
    """
    checks: dict[str, Callable[[str, Any, Any], None]] = {
        "above_zero": require_above_zero,
        "at_least": require_at_least,
        "one_of": require_choice,
    }
    for one in dataclasses.fields(loss):
        name, value = f"loss.{one.name}", getattr(loss, one.name)
        for rule, bound in one.metadata.items():
            if rule == "within":
                require_within(name, value, *bound)
            else:
                checks[rule](name, value, bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Inputs of a loss that belong to the training step, the same on every rank.

    Attributes:
        seed: Key of all random choices.
        step: Number of the training step.
        item_counts: (V,) int64 training events of each item; needed by proposals other than
            uniform. ``ItemCounts`` caches the tables built from them between steps.
    """

    seed: int
    step: int
    item_counts: Tensor | ItemCounts | None = None


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The value of a loss, and statistics to log.

    Attributes:
        loss: () float32 mean over the positions of all ranks, the same on every rank.
        statistics: Further numbers to log, by name.
    """

    loss: Tensor
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of a loss in one training step.

    Attributes:
        states: (N, D) states at the real positions of this rank.
        table: The item table or this rank's shard of it.
        targets: (N,) int64 items.
        weights: (N,) float weight of each position's loss, or None for ones.
        step: Seed, step and item counts.
    """

    states: Tensor
    table: Tensor | RowShard
    targets: Tensor
    weights: Tensor | None
    step: Step

    @property
    def num_items(self) -> int:
        """V, the number of items of the table."""
        return self.table.num_rows if isinstance(self.table, RowShard) else self.table.shape[0]

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks that hold the table; None for a single process."""
        return self.table.group if isinstance(self.table, RowShard) else None

    @property
    def draws(self) -> dict[str, int]:
        """Seed and step, as keyword arguments for a loss function with random choices."""
        return {"seed": self.step.seed, "step": self.step.step}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss(ABC):
    """Base class of losses and their options; all have ``normalize`` and ``temperature``.

    Attributes:
        name: Name of the loss on the command line.
        function: The function that computes the loss.
        is_baseline: Whether the loss is a baseline for comparison.
        normalize: Scale states and rows to unit L2 norm.
        temperature: Positive; divides the logits.

    Raises:
        ValueError: An option is out of range.
    """

    name: ClassVar[str]
    function: ClassVar[Callable[..., Any]]
    is_baseline: ClassVar[bool] = False

    normalize: bool = False
    temperature: float = option(1.0, above_zero="1.0 leaves the logits unchanged")

    def __post_init__(self) -> None:
        """Raises ValueError if an option of this loss breaks its rule."""
        check_options(self)

    def __call__(
        self,
        states: Tensor,
        table: Tensor | RowShard,
        targets: Tensor,
        *,
        weights: Tensor | None = None,
        step: Step,
    ) -> LossOutput:
        """The mean loss over the positions of all ranks, and statistics.

        Args:
            states: (N, D) states at the real positions of this rank.
            table: The item table or this rank's shard of it.
            targets: (N,) int64 items.
            weights: (N,) float weight of each position's loss, or None for ones.
            step: Seed, step and item counts.
        """
        return self.output(Batch(states, table, targets, weights, step))

    def output(self, batch: Batch) -> LossOutput:
        """The mean loss over the positions of all ranks, and statistics."""
        return LossOutput(self.evaluate(batch))

    def used_rows(self, batch: Batch) -> Tensor | None:
        """(n,) int64 rows of this rank's shard that the loss will read; None for all rows."""
        return None

    def evaluate(self, batch: Batch, **more: Any) -> Any:
        """The result of ``function`` with these options and the keyword arguments ``more``."""
        return type(self).function(
            batch.states,
            batch.table,
            batch.targets,
            weights=batch.weights,
            normalize=self.normalize,
            temperature=self.temperature,
            **self.arguments(batch),
            **more,
        )

    @abstractmethod
    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of ``function`` that are specific to this loss."""

    @abstractmethod
    def cost(self, work: Workload) -> LossCost:
        """Cost of one training step on one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothedLoss(Loss):
    """Base class of the losses over the whole catalog, exact or sampled without bias.

    Attributes:
        label_smoothing: Share of the target distribution that is spread evenly over all items, in
            [0, 0.99]; 0 turns it off.
    """

    label_smoothing: float = option(0.0, within=(0, 0.99, "0 turns it off, 0.1 is common"))

    def output(self, batch: Batch) -> LossOutput:
        """The mean loss over the positions of all ranks; with smoothing its term is added."""
        loss = self.evaluate(batch)
        if self.label_smoothing:
            loss = loss + label_smoothing(
                batch.states,
                batch.table,
                batch.targets,
                share=self.label_smoothing,
                drawn=self.drawn_for_smoothing(batch),
                weights=batch.weights,
                normalize=self.normalize,
                temperature=self.temperature,
            )
        return LossOutput(loss)

    def drawn_for_smoothing(self, batch: Batch) -> Tensor | None:
        """(K,) int64 sampled items that estimate the mean over the catalog; None: all items."""
        return None

    def smoothed(self, cost: LossCost, work: Workload, drawn: int | None = None) -> LossCost:
        """The cost of this loss from that of its cross-entropy alone."""
        return with_label_smoothing(cost, work, drawn) if self.label_smoothing else cost
