"""Metrics of a model, or of popularity, over evaluation users and the whole catalog, at any W."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MetricCollection

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.kernels.shard import RowShard
from shardrec.modules.metrics import ranking_metrics
from shardrec.modules.ranking import Blocks, Ragged, ranks_in_lists, top_items
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.prepared.loader import EvaluationBatch, EvaluationBatches, Prepared
from shardrec.pipeline.ranks import in_step, on_this_rank

__all__ = ["Scorer", "Split", "measure", "open_users"]

Split = Literal["validation", "test"]
Scorer = Callable[[Tensor, Tensor], Tensor]
"""From items (B, L) int64 and lengths (B,) int64 to states (B, D); collectives allowed."""


def measure(
    scorer: Scorer,
    shard: RowShard,
    batches: Iterable[EvaluationBatch],
    config: MeasureConfig,
    prepared: Prepared,
) -> dict[str, float]:
    """Metrics over all users of ``batches``, the same on every rank.

    Args:
        scorer: makes the states that are scored against the rows.
        shard: this rank's rows.
        batches: this rank's users; the same number of batches on every rank.
        config: list lengths and the seen filter.
        prepared: the data; training counts define popularity and what is new.

    Returns:
        Metrics by name; those with the suffix ``/known`` leave out targets that training never
        saw. ``users``, ``targets``, ``new_target_share`` and ``repeated_target_share`` say what
        was measured.

    Raises:
        ValueError: a row group is damaged; raised on all ranks.

    Collectives: an all-gather of small objects; for each batch an all-reduce of one number and the
    collectives of the scorer and of the ranking; at the end an all-reduce and those of the metrics.
    """
    meter = _Meter(shard, config, prepared)
    with torch.no_grad():
        for batch in in_step(batches, shard.group, shard.rows.device):
            batch = batch.to(shard.rows.device)
            meter.add(batch, scorer(batch.items, batch.lengths))
    return meter.result()


def open_users(
    prepared: Prepared,
    split: Split,
    config: MeasureConfig,
    max_length: int,
    group: dist.ProcessGroup | None,
) -> EvaluationBatches:
    """This rank's users of a split; the encoder reads the last ``max_length`` items of each.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged; raised on all ranks.

    Collectives: one all-gather of small objects.
    """
    return on_this_rank(
        lambda: EvaluationBatches(
            prepared,
            split,
            batch_size=config.batch_size,
            max_length=max_length,
            rank=Communicator(group).rank,
            world_size=Communicator(group).size,
        ),
        group,
    )


class _Meter:
    """Sums over users."""

    def __init__(self, shard: RowShard, config: MeasureConfig, prepared: Prepared) -> None:
        self.shard = shard
        self.config = config
        counts = on_this_rank(prepared.item_counts, shard.group)
        self.counts = counts.to(shard.rows.device)
        self.blocks = Blocks(states=config.block_states, rows=config.block_rows)
        self.all = self._metrics(prepared)
        self.known = self._metrics(prepared)
        # users, targets, new targets, repeated targets
        self.sums = torch.zeros(4, dtype=torch.int64, device=shard.rows.device)

    def add(self, batch: EvaluationBatch, states: Tensor) -> None:
        """Rank one batch and count its users."""
        targets, seen = batch.targets, batch.seen
        k = min(max(self.config.ks), self.shard.num_rows)
        hidden = seen if self.config.filter_seen else None
        _, items = top_items(states, self.shard, k, seen=hidden, keep=targets, blocks=self.blocks)
        ranks = ranks_in_lists(items, targets, missing=self.shard.num_rows + max(self.config.ks))
        is_new = self.counts[targets[0]] == 0
        is_repeated = _repeated(targets, seen, self.shard.num_rows)
        self._update(self.all, ranks, targets, items)
        owners = torch.repeat_interleave(targets[1])
        kept = torch.bincount(owners[~is_new], minlength=len(targets[1]))
        self._update(self.known, ranks[~is_new], (targets[0][~is_new], kept), items)
        self.sums += torch.stack(
            [(targets[1] > 0).sum(), targets[1].sum(), is_new.sum(), is_repeated.sum()]
        )

    def result(self) -> dict[str, float]:
        """The numbers of all ranks."""
        Communicator(self.shard.group).sum_(self.sums)
        users, targets, new, repeated = self.sums.tolist()
        values = {name: float(value) for name, value in self.all.compute().items()}
        for name, value in self.known.compute().items():
            if not name.startswith(("Coverage", "Surprisal")):  # of lists, not of targets
                values[f"{name}/known"] = float(value)
        return values | {
            "users": users,
            "targets": targets,
            "new_target_share": new / max(1, targets),
            "repeated_target_share": repeated / max(1, targets),
        }

    def _metrics(self, prepared: Prepared) -> MetricCollection:
        return ranking_metrics(
            self.config.ks,
            num_items=prepared.num_items,
            item_counts=self.counts,
            num_users=max(2, prepared.manifest.counts["train_users"]),
            process_group=self.shard.group,
        ).to(self.shard.rows.device)

    def _update(
        self, metrics: MetricCollection, ranks: Tensor, targets: Ragged, items: Tensor
    ) -> None:
        metrics.update(ranks=ranks, lengths=targets[1], targets=targets[0], items=items)


def _repeated(targets: Ragged, seen: Ragged, num_items: int) -> Tensor:
    """Whether each target is an item of its user's history.

    Example:
        >>> targets = torch.tensor([3, 4, 3]), torch.tensor([2, 1])
        >>> _repeated(targets, (torch.tensor([4, 5, 5]), torch.tensor([2, 1])), num_items=9)
        tensor([False,  True, False])
    """
    pairs = [torch.repeat_interleave(n) * num_items + values for values, n in (targets, seen)]
    return torch.isin(pairs[0], pairs[1])
