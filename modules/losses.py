"""The losses as a training step calls them: options in a dataclass, one signature for all.

The functions behind them take a plain table or a ``RowShard`` of any row-sharded table; they stand
in ``shardrec.kernels`` and are named here again for users of the sharded face.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels import (
    RowShard,
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.negatives import Mixture, Proposal, Uniform
from shardrec.kernels.ranks.communicator import Collective, total_over_ranks
from shardrec.modules.baselines import (
    binary_cross_entropy,
    eager_cross_entropy,
    generalized_binary_cross_entropy,
)
from shardrec.modules.item_counts import ItemCounts
from shardrec.modules.loss_options import check_options

__all__ = [
    "BCE",
    "CCE",
    "GBCE",
    "LOSSES",
    "RECE",
    "SCE",
    "Batch",
    "CCEMinus",
    "EagerCE",
    "ItemCounts",
    "Loss",
    "LossOutput",
    "Step",
    "cut_cross_entropy",
    "reduced_cross_entropy",
    "sampled_cross_entropy",
    "scalable_cross_entropy",
]


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
    """A loss and what it says about itself.

    Attributes:
        loss: () float32 mean over the positions of all ranks, the same on every rank.
        statistics: Numbers to log, by name.
    """

    loss: Tensor
    statistics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loss is called with.

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
    def inputs(self) -> tuple[Tensor, Tensor | RowShard, Tensor]:
        """States, table and targets."""
        return self.states, self.table, self.targets

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the table."""
        return self.table.group if isinstance(self.table, RowShard) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss(ABC):
    """A loss with its options; these two are common to all.

    Attributes:
        normalize: Take states and rows at unit length.
        temperature: Divides the logits.

    Raises:
        ValueError: An option is out of range.
    """

    normalize: bool = False
    temperature: float = 1.0

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

    @abstractmethod
    def output(self, batch: Batch) -> LossOutput:
        """The mean loss and its statistics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CCE(Loss):
    """Options of ``cut_cross_entropy``: the exact softmax over the catalog."""

    def output(self, batch: Batch) -> LossOutput:
        """Mean loss; nothing is drawn, so the step does not matter."""
        loss = cut_cross_entropy(
            *batch.inputs,
            weights=batch.weights,
            normalize=self.normalize,
            temperature=self.temperature,
        )
        return LossOutput(loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class CCEMinus(Loss):
    """Options of ``sampled_cross_entropy``.

    Attributes:
        num_negatives: K, draws per block of positions.
        share: Positions per block; 1 as published, 0 for the whole batch.
        proposal: uniform, popularity, in_batch, or mixed (half in-batch, rounded down, the rest
            uniform).
        popularity_exponent: Power of the training counts in the popularity proposal, in [0, 10].
        parity: The paper's form of the correction.
    """

    num_negatives: int = 1024
    share: int = 128
    proposal: str = "uniform"
    popularity_exponent: float = 1.0
    parity: bool = False

    def output(self, batch: Batch) -> LossOutput:
        """Mean loss; the table's gradient is sparse."""
        loss = sampled_cross_entropy(
            *batch.inputs,
            num_negatives=self.num_negatives,
            share=self.share or None,
            seed=batch.step.seed,
            step=batch.step.step,
            proposal=self._proposal(batch),
            parity=self.parity,
            sparse_grad=True,
            weights=batch.weights,
            normalize=self.normalize,
            temperature=self.temperature,
        )
        return LossOutput(loss)

    def _proposal(self, batch: Batch) -> Proposal:
        table, counts = batch.table, batch.step.item_counts
        num_items = table.num_rows if isinstance(table, RowShard) else table.shape[0]
        if self.proposal == "uniform":
            return Uniform(num_items)
        if counts is None:
            raise ValueError(
                f"item_counts must be given for proposal {self.proposal!r}, got None; "
                "pass the training counts of all items in the Step"
            )
        counts = ItemCounts.of(counts)
        if counts.counts.numel() != num_items:
            raise ValueError(
                f"item_counts must have one count for each of {num_items} items, got "
                f"{counts.counts.numel()}; pass those of this catalog"
            )
        if self.proposal == "popularity":
            return counts.popularity(self.popularity_exponent)
        targets = _targets_of_all_ranks(batch.targets, batch.group)
        in_batch = counts.in_batch(targets)
        if self.proposal == "in_batch":
            return in_batch
        half = self.num_negatives // 2
        return Mixture([(in_batch, half), (Uniform(num_items), self.num_negatives - half)])


@dataclass(frozen=True, slots=True, kw_only=True)
class SCE(Loss):
    """Options of ``scalable_cross_entropy``; 0 takes the default that follows from the batch.

    Attributes:
        num_buckets: n_b, or 0 for ``2 sqrt(N)``.
        positions_per_bucket: b_x, or 0 for ``2 sqrt(N)``; where there are fewer, all of them.
        items_per_bucket: b_y; where the catalog is smaller, all of it.
        mix: Centres are random combinations of the states.
    """

    num_buckets: int = 0
    positions_per_bucket: int = 0
    items_per_bucket: int = 256
    mix: bool = True

    def output(self, batch: Batch) -> LossOutput:
        """Mean loss over covered positions and their share; the table's gradient is sparse."""
        weighted, covered = scalable_cross_entropy(
            *batch.inputs,
            num_buckets=self.num_buckets or None,
            positions_per_bucket=self.positions_per_bucket or None,
            items_per_bucket=self.items_per_bucket,
            mix=self.mix,
            seed=batch.step.seed,
            step=batch.step.step,
            sparse_grad=True,
            weights=batch.weights,
            reduction="none",
            normalize=self.normalize,
            temperature=self.temperature,
        )
        factors = torch.ones_like(weighted) if batch.weights is None else batch.weights
        sums = torch.stack([weighted.sum(), (factors * covered).sum()])
        counts = torch.tensor([float(covered.sum()), covered.numel()], device=sums.device)
        sums = total_over_ranks(torch.cat([sums, counts]), batch.group)
        norm, num_covered, num_positions = sums[1:].tolist()
        statistics = {"covered_share": num_covered / max(num_positions, 1)}
        return LossOutput(sums[0] / (norm or 1.0), statistics)


@dataclass(frozen=True, slots=True, kw_only=True)
class RECE(Loss):
    """Options of ``reduced_cross_entropy``; 0 takes the default that follows from the batch.

    Attributes:
        num_buckets: n_b, or 0 for ``sqrt(4 min(N, V) (1 + 2 e))``.
        num_chunks: n_c, or 0 for as many as buckets.
        num_rounds: r.
        num_neighbor_chunks: e.
        align: "bucket", or "rank" as published.
    """

    num_buckets: int = 0
    num_chunks: int = 0
    num_rounds: int = 4
    num_neighbor_chunks: int = 1
    align: str = "bucket"

    def output(self, batch: Batch) -> LossOutput:
        """Mean loss; the table's gradient is dense."""
        loss = reduced_cross_entropy(
            *batch.inputs,
            num_buckets=self.num_buckets or None,
            num_chunks=self.num_chunks or None,
            num_rounds=self.num_rounds,
            num_neighbor_chunks=self.num_neighbor_chunks,
            align=self.align,
            seed=batch.step.seed,
            step=batch.step.step,
            weights=batch.weights,
            normalize=self.normalize,
            temperature=self.temperature,
        )
        return LossOutput(loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerCE(Loss):
    """Options of the full softmax with all logits in memory: a baseline."""

    def output(self, batch: Batch) -> LossOutput:
        """Mean loss; nothing is drawn, so the step does not matter."""
        loss = eager_cross_entropy(
            *batch.inputs,
            weights=batch.weights,
            normalize=self.normalize,
            temperature=self.temperature,
        )
        return LossOutput(loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class BCE(Loss):
    """Options of binary cross-entropy against uniform negatives of each position: a baseline.

    Attributes:
        num_negatives: K uniform negatives per position.
    """

    num_negatives: int = 1

    def output(self, batch: Batch) -> LossOutput:
        """Mean loss."""
        loss = binary_cross_entropy(
            *batch.inputs,
            num_negatives=self.num_negatives,
            seed=batch.step.seed,
            step=batch.step.step,
            weights=batch.weights,
            normalize=self.normalize,
            temperature=self.temperature,
        )
        return LossOutput(loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class GBCE(Loss):
    """Options of gBCE (arXiv 2308.07192): a baseline.

    Attributes:
        num_negatives: K uniform negatives per position.
        calibration: t in [0, 1]; 0 is BCE, 1 calibrates the scores fully.
    """

    num_negatives: int = 256
    calibration: float = 0.75

    def output(self, batch: Batch) -> LossOutput:
        """Mean loss."""
        loss = generalized_binary_cross_entropy(
            *batch.inputs,
            num_negatives=self.num_negatives,
            calibration=self.calibration,
            seed=batch.step.seed,
            step=batch.step.step,
            weights=batch.weights,
            normalize=self.normalize,
            temperature=self.temperature,
        )
        return LossOutput(loss)


LOSSES: dict[str, type[Loss]] = {
    "cce": CCE,
    "cce_minus": CCEMinus,
    "sce": SCE,
    "rece": RECE,
    "eager_ce": EagerCE,
    "bce": BCE,
    "gbce": GBCE,
}


def _targets_of_all_ranks(targets: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return targets.long()
    exchange = Collective.meet(group, targets.numel(), range(0), 0, targets.device)
    return exchange.gather_all(targets.long())
