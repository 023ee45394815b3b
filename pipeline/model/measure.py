"""Metrics of a model or baseline over evaluation users and the whole catalog, at any W."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection

from shardrec.kernels.ranks.communicator import Communicator
from shardrec.modules.metrics import MeanOverUsers, combine_ranks, ranking_metrics
from shardrec.modules.ranking import Ragged, ranks_in_lists
from shardrec.pipeline.model.config import MeasureConfig
from shardrec.pipeline.model.ranker import Ranker
from shardrec.pipeline.prepared.loader import EvaluationBatch, EvaluationBatches, Prepared
from shardrec.pipeline.ranks import in_step, on_this_rank

__all__ = ["Measurement", "Split", "measure", "open_users"]

Split = Literal["validation", "test"]


@dataclass(frozen=True, slots=True)
class Measurement:
    """The result of ``measure``, the same on every rank unless stated otherwise.

    Attributes:
        metrics: value of each metric by name. The suffix ``/known`` leaves out targets without
            training events, ``/new`` leaves out all others and exists only if a target is new.
            ``users``, ``targets``, ``new_target_share`` and ``repeated_target_share`` describe what
            was measured.
        standard_errors: standard errors of the metrics that are means over users, by name.
        users: (U,) int64 rows of this rank's users in the file of the split.
        ranks: for this rank's users, (T,) int32 rank of each target, 0 the best and -1 if it is not
            in the list, and (U,) number of targets of each user.
    """

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    users: Tensor
    ranks: Ragged


def measure(
    ranker: Ranker,
    batches: Iterable[EvaluationBatch],
    config: MeasureConfig,
    prepared: Prepared,
) -> Measurement:
    """Metrics over all users of ``batches``.

    Args:
        ranker: makes the lists.
        batches: this rank's users; the same number of batches on every rank.
        config: list lengths and candidates.
        prepared: the data; its training counts define popularity and which targets are new.

    Raises:
        ValueError: a row group is damaged; raised on all ranks.

    Collectives: an all-gather of small objects; for each batch an all-reduce of one number and the
    collectives of the ranker; at the end an all-reduce and those of ``combine_ranks``.
    """
    meter = _Meter(ranker, config, prepared)
    with torch.no_grad():
        for batch in in_step(batches, ranker.group, ranker.device):
            meter.add(batch.to(ranker.device))
    return meter.result()


def open_users(
    prepared: Prepared,
    split: Split,
    config: MeasureConfig,
    max_length: int,
    group: dist.ProcessGroup | None,
) -> EvaluationBatches:
    """Batches of this rank's users of a split, with the last ``max_length`` items of each.

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
            sample_users=config.sample_users,
            rank=Communicator(group).rank,
            world_size=Communicator(group).size,
        ),
        group,
    )


_LONGEST_LIST = 10_000  # of a smaller catalog; a longer list is mostly padding


class _Meter:
    """Sums over users."""

    def __init__(self, ranker: Ranker, config: MeasureConfig, prepared: Prepared) -> None:
        most = max(prepared.num_items, _LONGEST_LIST)
        if max(config.ks) > most:
            raise ValueError(
                f"ks must be list lengths of at most {most:,} for this catalog, got "
                f"{max(config.ks):,}; shorten the lists"
            )
        self.ranker = ranker
        self.config = config
        self.num_items = prepared.num_items
        counts = on_this_rank(prepared.item_counts, ranker.group)
        self.counts = counts.to(ranker.device)
        allowed = self.counts >= config.min_count
        self.allowed = None if allowed.all() else allowed
        self.all = self._metrics(prepared)
        self.known = self._metrics(prepared)
        self.own: list[tuple[Tensor, Tensor, Tensor]] = []
        self.new = self._metrics(prepared)
        # users, targets, new targets, repeated targets
        self.sums = torch.zeros(4, dtype=torch.int64, device=ranker.device)

    def add(self, batch: EvaluationBatch) -> None:
        """Rank one batch and count its users."""
        targets, seen = batch.targets, batch.seen
        longest = max(self.config.ks)
        k = min(longest, self.num_items)
        hidden = seen if self.config.filter_seen else None
        _, items = self.ranker.top(batch.items, batch.lengths, k, hidden, self.allowed)
        items = F.pad(items, (0, longest - k), value=-1)
        ranks = ranks_in_lists(items, targets, missing=self.num_items + longest)
        listed = ranks.where(ranks < longest, -1).int()
        self.own.append((batch.users.cpu(), listed.cpu(), targets[1].cpu()))
        is_new = self.counts[targets[0]] == 0
        is_repeated = _repeated(targets, seen, self.num_items)
        self._update(self.all, ranks, targets, items)
        owners = torch.repeat_interleave(targets[1])
        for metrics, chosen in ((self.known, ~is_new), (self.new, is_new)):
            kept = torch.bincount(owners[chosen], minlength=len(targets[1]))
            self._update(metrics, ranks[chosen], (targets[0][chosen], kept), items)
        self.sums += torch.stack(
            [(targets[1] > 0).sum(), targets[1].sum(), is_new.sum(), is_repeated.sum()]
        )

    def result(self) -> Measurement:
        """The numbers of all ranks."""
        Communicator(self.ranker.group).sum_(self.sums)
        sets = (self.all, self.known, self.new)
        combine_ranks([one for metrics in sets for one in metrics.values()], self.ranker.group)
        users, targets, new, repeated = self.sums.tolist()
        values = {name: float(value) for name, value in self.all.compute().items()}
        for name, value in self.known.compute().items():
            if not name.startswith(("Coverage", "Surprisal")):  # of lists, not of targets
                values[f"{name}/known"] = float(value)
        for name, value in self.new.compute().items() if new else ():
            # New items are all in the tail.
            if not name.startswith(("Coverage", "Surprisal")) and "/" not in name:
                values[f"{name}/new"] = float(value)
        values |= {
            "users": users,
            "targets": targets,
            "new_target_share": new / max(1, targets),
            "repeated_target_share": repeated / max(1, targets),
        }
        errors = {
            f"{name}{suffix}": float(metric.standard_error())
            for suffix, metrics in (("", self.all), ("/known", self.known), ("/new", self.new))
            for name, metric in metrics.items()
            if isinstance(metric, MeanOverUsers) and f"{name}{suffix}" in values
        }
        none = torch.zeros(0, dtype=torch.int64)
        own = [(none, none.int(), none), *self.own]
        rows, ranks, lengths = (torch.cat(part) for part in zip(*own, strict=True))
        return Measurement(values, errors, rows, (ranks, lengths))

    def _metrics(self, prepared: Prepared) -> MetricCollection:
        return ranking_metrics(
            self.config.ks,
            num_items=prepared.num_items,
            item_counts=self.counts,
            num_users=max(2, prepared.manifest.counts["train_users"]),
            process_group=self.ranker.group,
        ).to(self.ranker.device)

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
