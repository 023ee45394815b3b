"""What a loss is to a training step: options that are checked, inputs, an output and a cost."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor

from shardrec.kernels import RowShard
from shardrec.kernels.cost.terms import LossCost
from shardrec.kernels.ranks.traffic import Workload
from shardrec.modules.item_counts import ItemCounts
from shardrec.modules.option_checks import (
    require_above_zero,
    require_at_least,
    require_choice,
    require_within,
)

__all__ = ["Batch", "Loss", "LossOutput", "Step", "check_options", "option"]


def option(default: Any, **rule: Any) -> Any:
    """A dataclass field with a default and a rule.

    Args:
        default: The default of the field.
        rule: One of ``above_zero="hint"``, ``at_least=number``, ``one_of=(words)`` and
            ``within=(low, high, "hint")``. Whole numbers have no upper bound: a bucket takes at
            most what there is.
    """
    return dataclasses.field(default=default, metadata=rule)


def check_options(loss: Any) -> None:
    """Refuses a loss whose options no batch could be trained with.

    Args:
        loss: An instance of a dataclass whose fields were made by ``option``.

    Raises:
        ValueError: An option breaks its rule; the message names it as ``train`` does.
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
    """What a loss may know besides states, table and targets; the same on every rank.

    Attributes:
        seed: Key of all random choices.
        step: Training step.
        item_counts: (V,) int64 training events of each item; needed by proposals other than
            uniform. ``ItemCounts`` keeps the tables made of them from step to step.
    """

    seed: int
    step: int
    item_counts: Tensor | ItemCounts | None = None


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss and its statistics.

    Attributes:
        loss: () float32 mean over the positions of all ranks, the same on every rank.
        statistics: Numbers to log, by name.
    """

    loss: Tensor
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of a loss.

    Attributes:
        states: (N, D) states at the real positions of this rank.
        table: The item table or this rank's shard of it.
        targets: (N,) int64 items.
        weights: (N,) float factors of the positions' losses, or None.
        step: Seed, step and item counts.
    """

    states: Tensor
    table: Tensor | RowShard
    targets: Tensor
    weights: Tensor | None
    step: Step

    @property
    def num_items(self) -> int:
        """V."""
        return self.table.num_rows if isinstance(self.table, RowShard) else self.table.shape[0]

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the table."""
        return self.table.group if isinstance(self.table, RowShard) else None

    @property
    def draws(self) -> dict[str, int]:
        """Seed and step, as the functions of losses that draw take them."""
        return {"seed": self.step.seed, "step": self.step.step}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss(ABC):
    """A loss with its options; these two are common to all.

    Attributes:
        name: Of the loss on the command line.
        function: The public function behind it.
        is_baseline: Whether it is there to be compared with.
        normalize: Take states and rows at unit length.
        temperature: Divides the logits.

    Raises:
        ValueError: An option is out of range.
    """

    name: ClassVar[str]
    function: ClassVar[Callable[..., Any]]
    is_baseline: ClassVar[bool] = False

    normalize: bool = False
    temperature: float = option(1.0, above_zero="1.0 leaves the logits alone")

    def __post_init__(self) -> None:
        """Checks the options of this loss."""
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
        """Mean loss of the batch of all ranks.

        Args:
            states: (N, D) states at the real positions of this rank.
            table: The item table or this rank's shard of it.
            targets: (N,) int64 items.
            weights: (N,) float factors of the positions' losses, or None.
            step: Seed, step and item counts.
        """
        return self.output(Batch(states, table, targets, weights, step))

    def output(self, batch: Batch) -> LossOutput:
        """The mean loss and its statistics."""
        return LossOutput(self.evaluate(batch))

    def evaluate(self, batch: Batch, **more: Any) -> Any:
        """What ``function`` returns for these options; ``more`` are further arguments of it."""
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
        """Arguments of ``function`` that this loss alone has."""

    @abstractmethod
    def cost(self, work: Workload) -> LossCost:
        """What a step costs a rank."""
