"""The losses that can be trained: for each its options, its function and its cost.

``AnyLoss`` is the registry: every loss in it can be trained, planned, swept and shown in the demo.
"""

from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from shardrec.kernels import (
    RowShard,
    cut_cross_entropy,
    hybrid_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.block_logsumexp import RowIds
from shardrec.kernels.cce import cut_cross_entropy_cost
from shardrec.kernels.cce_minus import sampled_cross_entropy_cost
from shardrec.kernels.cost.terms import LossCost
from shardrec.kernels.hce import hybrid_cross_entropy_cost
from shardrec.kernels.negatives import STREAM_SMOOTHING, Mixture, Proposal, Uniform, draw_below
from shardrec.kernels.negatives.sampler import Sampler
from shardrec.kernels.ranks.chunks import Layout
from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.ranks.traffic import Workload
from shardrec.kernels.rece import reduced_cross_entropy_cost
from shardrec.kernels.sce import scalable_cross_entropy_cost
from shardrec.modules.baseline_losses import (
    binary_cross_entropy,
    eager_cross_entropy,
    eager_cross_entropy_cost,
    generalized_binary_cross_entropy,
    paired_cross_entropy_cost,
)
from shardrec.modules.item_counts import ItemCounts
from shardrec.modules.loss import Batch, Loss, LossOutput, SmoothedLoss, Step, option

__all__ = [
    "BCE",
    "CCE",
    "GBCE",
    "HCE",
    "LOSSES",
    "RECE",
    "SCE",
    "AnyLoss",
    "Batch",
    "CCEMinus",
    "EagerCE",
    "ItemCounts",
    "Loss",
    "LossOutput",
    "SmoothedLoss",
    "Step",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CCE(SmoothedLoss):
    """Options of ``cut_cross_entropy``: the exact softmax over the catalog."""

    name = "cce"
    function = staticmethod(cut_cross_entropy)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """No further arguments."""
        return {}

    def cost(self, work: Workload) -> LossCost:
        """Cost of one training step on one rank."""
        return self.smoothed(cut_cross_entropy_cost(work), work)


@dataclass(frozen=True, slots=True, kw_only=True)
class CCEMinus(SmoothedLoss):
    """Options of ``sampled_cross_entropy``; the table's gradient is sparse.

    Attributes:
        num_negatives: K, number of draws per block of positions; of label smoothing in a step.
        share: Number of positions in a block, which share their draws; 1 as published, 0 for the
            whole batch.
        proposal: uniform, popularity, in_batch, or mixed (half in-batch, rounded down, the rest
            uniform).
        popularity_exponent: Exponent of the training counts in the popularity proposal, in [0, 10].
        parity: Use the paper's correction instead of the unbiased one.
    """

    name = "cce_minus"
    function = staticmethod(sampled_cross_entropy)

    num_negatives: int = option(1024, at_least=1)
    share: int = option(128, at_least=0)
    proposal: str = option("uniform", one_of=("uniform", "popularity", "in_batch", "mixed"))
    # Higher powers of large counts overflow, and would leave practically one item to draw.
    popularity_exponent: float = option(1.0, within=(0, 10, "0 is uniform, 1 follows the counts"))
    parity: bool = False

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Number of draws, positions that share them, and their distribution."""
        return {
            "num_negatives": self.num_negatives,
            "share": self.share or None,
            "proposal": self._proposal(batch),
            "parity": self.parity,
            "sparse_grad": True,
            **batch.draws,
        }

    def used_rows(self, batch: Batch) -> Tensor:
        """(n,) int64 rows of this rank's shard that are drawn, or are a target, on any rank.

        Collectives: an all-gather of the targets.
        """
        assert isinstance(batch.table, RowShard)
        targets = _targets_of_all_ranks(batch.targets, batch.group)
        sampler = Sampler(
            proposal=self._proposal(batch),
            num_negatives=self.num_negatives,
            num_positions=targets.numel(),
            share=self.share or None,
            seed=batch.step.seed,
            step=batch.step.step,
        )
        first = batch.table.first_row
        if self.label_smoothing:  # as if they were targets
            targets = torch.cat([targets, self.drawn_for_smoothing(batch)])
        return sampler.drawn_rows(RowIds(first, batch.table.rows.shape[0]), targets) - first

    def drawn_for_smoothing(self, batch: Batch) -> Tensor:
        """(K,) int64 uniform draws of the step."""
        return draw_below(
            batch.num_items,
            torch.zeros(1, dtype=torch.int64, device=batch.states.device),
            self.num_negatives,
            seed=batch.step.seed,
            step=batch.step.step,
            stream=STREAM_SMOOTHING,
        )[0]

    def cost(self, work: Workload) -> LossCost:
        """Cost of one training step on one rank."""
        share = self.share or None
        cost = sampled_cross_entropy_cost(work, self.num_negatives, share, self.proposal)
        return self.smoothed(cost, work, drawn=self.num_negatives)

    def _proposal(self, batch: Batch) -> Proposal:
        num_items, counts = batch.num_items, batch.step.item_counts
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
        in_batch = counts.in_batch(_targets_of_all_ranks(batch.targets, batch.group))
        if self.proposal == "in_batch":
            return in_batch
        half = self.num_negatives // 2
        return Mixture([(in_batch, half), (Uniform(num_items), self.num_negatives - half)])


@dataclass(frozen=True, slots=True, kw_only=True)
class SCE(Loss):
    """Options of ``scalable_cross_entropy``; 0 is the default, which depends on the batch size.

    The table's gradient is sparse, and the share of covered positions is logged.

    Attributes:
        num_buckets: n_b, or 0 for ``2 sqrt(N)``.
        positions_per_bucket: b_x, or 0 for ``2 sqrt(N)``; at most N.
        items_per_bucket: b_y, at most the number of items.
        mix: Centres are random-sign combinations of the states; else random sign vectors.
    """

    name = "sce"
    function = staticmethod(scalable_cross_entropy)

    num_buckets: int = option(0, at_least=0)
    positions_per_bucket: int = option(0, at_least=0)
    items_per_bucket: int = option(256, at_least=1)
    mix: bool = True

    def output(self, batch: Batch) -> LossOutput:
        """Mean loss over the covered positions of all ranks; "covered_share" is their share."""
        weighted, covered = self.evaluate(batch, reduction="none")
        factors = torch.ones_like(weighted) if batch.weights is None else batch.weights
        sums = torch.stack([weighted.sum(), (factors * covered).sum()])
        counts = torch.tensor([float(covered.sum()), covered.numel()], device=sums.device)
        sums = Communicator(batch.group).total(torch.cat([sums, counts]))
        norm, num_covered, num_positions = sums[1:].tolist()
        statistics = {"covered_share": num_covered / max(num_positions, 1)}
        return LossOutput(sums[0] / (norm or 1.0), statistics)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Number and sizes of the buckets, and how centres are chosen."""
        return {
            "num_buckets": self.num_buckets or None,
            "positions_per_bucket": self.positions_per_bucket or None,
            "items_per_bucket": self.items_per_bucket,
            "mix": self.mix,
            "sparse_grad": True,
            **batch.draws,
        }

    def cost(self, work: Workload) -> LossCost:
        """Cost of one training step on one rank."""
        return scalable_cross_entropy_cost(
            work, self.num_buckets or None, self.positions_per_bucket or None, self.items_per_bucket
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RECE(Loss):
    """Options of ``reduced_cross_entropy``; 0 is the default, which depends on the batch size.

    The table's gradient is dense.

    Attributes:
        num_buckets: n_b, or 0 for ``sqrt(4 min(N, V) (1 + 2 e))``.
        num_chunks: n_c, or 0 for as many as buckets.
        num_rounds: r, number of rounds, each with its own hash.
        num_neighbor_chunks: e, chunks on either side of a position's own.
        align: "bucket" aligns positions with the items of their bucket; "rank" by sort order
            alone, as published.
    """

    name = "rece"
    function = staticmethod(reduced_cross_entropy)

    num_buckets: int = option(0, at_least=0)
    num_chunks: int = option(0, at_least=0)
    num_rounds: int = option(4, at_least=1)
    num_neighbor_chunks: int = option(1, at_least=0)
    align: str = option("bucket", one_of=("bucket", "rank"))

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Numbers of buckets, chunks and rounds of the hash."""
        return {
            "num_buckets": self.num_buckets or None,
            "num_chunks": self.num_chunks or None,
            "num_rounds": self.num_rounds,
            "num_neighbor_chunks": self.num_neighbor_chunks,
            "align": self.align,
            **batch.draws,
        }

    def cost(self, work: Workload) -> LossCost:
        """Cost of one training step on one rank."""
        return reduced_cross_entropy_cost(
            work,
            self.num_buckets or None,
            self.num_chunks or None,
            self.num_rounds,
            self.num_neighbor_chunks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HCE(Loss):
    """Options of ``hybrid_cross_entropy``; the table's gradient is sparse.

    Attributes:
        num_buckets: n_b, or 0 for ``2 sqrt(N)``.
        items_per_bucket: b_y, the hardest items of a bucket; at most the number of items.
        num_negatives: K uniform draws per bucket, for all other items.
        mix: Centres are random-sign combinations of the states; else random sign vectors.
    """

    name = "hce"
    function = staticmethod(hybrid_cross_entropy)

    num_buckets: int = option(0, at_least=0)
    items_per_bucket: int = option(256, at_least=1)
    num_negatives: int = option(256, at_least=1)
    mix: bool = True

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Number of buckets, of hard items and of negatives, and how centres are chosen."""
        return {
            "num_buckets": self.num_buckets or None,
            "items_per_bucket": self.items_per_bucket,
            "num_negatives": self.num_negatives,
            "mix": self.mix,
            "sparse_grad": True,
            **batch.draws,
        }

    def cost(self, work: Workload) -> LossCost:
        """Cost of one training step on one rank."""
        return hybrid_cross_entropy_cost(
            work, self.num_buckets or None, self.items_per_bucket, self.num_negatives
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerCE(SmoothedLoss):
    """Options of ``eager_cross_entropy``, full softmax with all logits in memory: a baseline."""

    name = "eager_ce"
    function = staticmethod(eager_cross_entropy)
    is_baseline = True

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """No further arguments."""
        return {}

    def cost(self, work: Workload) -> LossCost:
        """Cost of one training step on one rank."""
        return self.smoothed(eager_cross_entropy_cost(work), work)


@dataclass(frozen=True, slots=True, kw_only=True)
class BCE(Loss):
    """Options of ``binary_cross_entropy``, with uniform negatives per position: a baseline.

    Attributes:
        num_negatives: K uniform negatives per position.
    """

    name = "bce"
    function = staticmethod(binary_cross_entropy)
    is_baseline = True

    num_negatives: int = option(1, at_least=1)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Number of negatives."""
        return {"num_negatives": self.num_negatives, **batch.draws}

    def cost(self, work: Workload) -> LossCost:
        """Cost of one training step on one rank."""
        return paired_cross_entropy_cost(work, self.num_negatives)


@dataclass(frozen=True, slots=True, kw_only=True)
class GBCE(Loss):
    """Options of ``generalized_binary_cross_entropy``, gBCE (arXiv 2308.07192): a baseline.

    Attributes:
        num_negatives: K uniform negatives per position.
        calibration: t in [0, 1]; 0 is BCE, 1 calibrates the scores fully.
    """

    name = "gbce"
    function = staticmethod(generalized_binary_cross_entropy)
    is_baseline = True

    num_negatives: int = option(256, at_least=1)
    calibration: float = option(0.75, within=(0, 1, "0 is BCE, 1 calibrates the scores fully"))

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Number of negatives, and the calibration."""
        return {
            "num_negatives": self.num_negatives,
            "calibration": self.calibration,
            **batch.draws,
        }

    def cost(self, work: Workload) -> LossCost:
        """Cost of one training step on one rank."""
        return paired_cross_entropy_cost(work, self.num_negatives)


AnyLoss = CCE | CCEMinus | SCE | RECE | HCE | EagerCE | BCE | GBCE
"""Every loss that can be trained."""

LOSSES: dict[str, type[Loss]] = {loss.name: loss for loss in get_args(AnyLoss)}
"""Every loss by its name."""


def _targets_of_all_ranks(targets: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return targets.long()
    layout = Layout.gathered(group, targets.numel(), range(0), 0, targets.device)
    return layout.gather_all(targets.long())
