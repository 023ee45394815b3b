"""Ranking metrics as torchmetrics classes, with equal results on any number of ranks.

The arguments of each metric's `update` are some of:

- ``ranks`` (T,) int64: rank of each target, 0 the best, any number >= k if it is not in the list
- ``lengths`` (B,) int64: number of targets of each user, in the order of ``ranks``; None: one each
- ``targets`` (T,) int64: the target items
- ``items`` (B, >= k) int64: recommended items, best first, -1 at the end of a short list

`shardrec.modules.ranking` computes ``ranks`` and ``items``. A mean over users leaves out users
without targets, and is NaN before the first user. Sums are float64 and counts int64.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from shardrec.kernels.ranks.communicator import Communicator

__all__ = [
    "MRR",
    "NDCG",
    "Coverage",
    "HitRate",
    "MeanOverUsers",
    "PopularityRecall",
    "Recall",
    "Surprisal",
    "combine_ranks",
    "popularity_buckets",
    "ranking_metrics",
]

BUCKETS = ("head", "torso", "tail")


def ranking_metrics(
    ks: Sequence[int],
    *,
    num_items: int,
    item_counts: Tensor,
    num_users: int,
    process_group: dist.ProcessGroup | None = None,
) -> MetricCollection:
    """All metrics at every k, with keys such as "NDCG@10" and "Recall@10/tail".

    `update` takes ``ranks``, ``lengths``, ``targets`` and ``items`` as keyword arguments.

    Args:
        ks: list lengths.
        num_items: V.
        item_counts: (V,) int64 training events of each item.
        num_users: U, number of training users.
        process_group: ranks to sum over; None means all.

    Collectives: none here; `compute` all-gathers the sums.
    """
    metrics: dict[str, Metric] = {}
    for k in ks:
        metrics |= {
            f"NDCG@{k}": NDCG(k, process_group),
            f"Recall@{k}": Recall(k, process_group),
            f"HitRate@{k}": HitRate(k, process_group),
            f"MRR@{k}": MRR(k, process_group),
            f"Coverage@{k}": Coverage(k, num_items, process_group),
            f"Surprisal@{k}": Surprisal(k, item_counts, num_users, process_group),
            f"PopularityRecall@{k}": PopularityRecall(k, item_counts, process_group),
        }
    # Compute groups would merge metrics of different k if their sums are equal after one batch.
    return MetricCollection(metrics, compute_groups=False)


def combine_ranks(metrics: Sequence[Metric], group: dist.ProcessGroup | None) -> None:
    """Give every metric the states of all ranks at once; add nothing to it afterwards.

    `compute` and `standard_error` return the same, without a collective for every single state.

    Args:
        metrics: those of this module, the same on every rank.
        group: the ranks; None for a single process.

    Collectives: an all-gather of all sums for each of their dtypes, and an all-reduce for each
    `Coverage`.
    """
    ranks, sums = Communicator(group), defaultdict[torch.dtype, list[tuple[Metric, str]]](list)
    for metric in metrics:
        metric.distributed_available_fn = lambda: False
        for name in metric._defaults:  # the oldest torchmetrics has no public name for it
            state = getattr(metric, name)
            if isinstance(metric, Coverage):
                setattr(metric, name, ranks.max(state))
            else:
                sums[state.dtype].append((metric, name))
    for places in sums.values() if ranks.size > 1 else ():
        states = [getattr(metric, name) for metric, name in places]
        gathered = ranks.all_gather(torch.cat([state.flatten() for state in states]))
        parts = gathered.split([state.numel() for state in states], dim=1)
        for (metric, name), state, part in zip(places, states, parts, strict=True):
            setattr(metric, name, part.contiguous().view(ranks.size, *state.shape).sum(0))


class _ListMetric(Metric):
    """A metric of lists of ``k`` items, summed over the ranks of a group (None means all)."""

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, k: int, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(process_group=process_group)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}; raise it")
        self.k = k

    def _lists(self, items: Tensor) -> Tensor:
        if items.dim() != 2 or items.shape[1] < self.k:
            raise ValueError(
                f"items must be of shape (B, {self.k}) or longer, got {tuple(items.shape)}; "
                "ask the ranking for more items"
            )
        return items[:, : self.k]


class MeanOverUsers(_ListMetric):
    """Mean of one number per user, and its standard error."""

    total: Tensor
    squares: Tensor
    num_users: Tensor

    def __init__(self, k: int, process_group: dist.ProcessGroup | None = None) -> None:
        """Starts with no users."""
        super().__init__(k, process_group)
        for name in ("total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_users", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """() float64 mean over users; NaN before the first user."""
        return self.total / self.num_users

    def standard_error(self) -> Tensor:
        """() float64 standard error of the mean over users; NaN for fewer than two users.

        It is the standard deviation of the users' numbers divided by the square root of their
        count: the error of the mean if these users are a random sample.

        Collectives: as `compute`, all-gathers of the sums.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            users = self.num_users.double()
            spread = (self.squares - self.total**2 / users).clamp(min=0)
            return (spread / (users * (users - 1))).sqrt()

    def _add(self, numbers: Tensor) -> None:
        """Adds users by their (n,) float64 numbers."""
        self.total += numbers.sum()
        self.squares += numbers.square().sum()
        self.num_users += len(numbers)


class _OfTargets(MeanOverUsers):
    """Mean over the users with targets; `per_user` of the subclass computes each number."""

    def update(self, ranks: Tensor, lengths: Tensor | None = None) -> None:
        """Adds users, by the (T,) ranks of their targets and (B,) numbers of targets."""
        lengths = _lengths_of(ranks, lengths)
        self._add(self.per_user(ranks, lengths)[lengths > 0])

    @abstractmethod
    def per_user(self, ranks: Tensor, lengths: Tensor) -> Tensor:
        """(B,) float64 number of each user; any value for users without targets."""


class NDCG(_OfTargets):
    """Discounted cumulative gain of the list divided by that of an ideal list (NDCG).

    A target at rank r < k gains 1 / log2(r + 2); an ideal list starts with the targets, at most k.

    >>> metric = NDCG(k=3)
    >>> metric.update(torch.tensor([0, 2, 5]), torch.tensor([2, 1]))  # (1 + 1/2) / (1 + 0.6309), 0
    >>> round(metric.compute().item(), 4)
    0.4599
    """

    def per_user(self, ranks: Tensor, lengths: Tensor) -> Tensor:
        """(B,) float64 NDCG of each user."""
        places = torch.arange(2, self.k + 2, dtype=torch.float64, device=ranks.device)
        perfect = places.log2().reciprocal().cumsum(0)  # (k,)
        gains = (ranks.double() + 2).log2().reciprocal().where(ranks < self.k, 0.0)
        return _sum_by_user(gains, lengths) / perfect[lengths.clamp(1, self.k) - 1]


class Recall(_OfTargets):
    """Share of a user's targets in the list; equal to `HitRate` with one target per user.

    >>> metric = Recall(k=3)
    >>> metric.update(torch.tensor([0, 2, 7, 9, 1]), torch.tensor([4, 1]))  # 2/4 and 1/1
    >>> metric.compute().item()
    0.75
    """

    def per_user(self, ranks: Tensor, lengths: Tensor) -> Tensor:
        """(B,) float64 recall of each user."""
        return _sum_by_user((ranks < self.k).double(), lengths) / lengths


class HitRate(_OfTargets):
    """Share of users with at least one target in the list.

    >>> metric = HitRate(k=3)
    >>> metric.update(torch.tensor([0, 2, 7, 9, 4]), torch.tensor([4, 1]))
    >>> metric.compute().item()
    0.5
    """

    def per_user(self, ranks: Tensor, lengths: Tensor) -> Tensor:
        """(B,) float64, 1 for each user with a hit."""
        return (_sum_by_user((ranks < self.k).double(), lengths) > 0).double()


class MRR(_OfTargets):
    """Mean over users of 1 / (1 + rank) of the best target, 0 if it is not in the list (MRR).

    >>> metric = MRR(k=3)
    >>> metric.update(torch.tensor([4, 1, 3]), torch.tensor([2, 1]))  # 1/2 and 0
    >>> metric.compute().item()
    0.25
    """

    def per_user(self, ranks: Tensor, lengths: Tensor) -> Tensor:
        """(B,) float64 reciprocal rank of each user's best target."""
        found = (ranks.double() + 1).reciprocal().where(ranks < self.k, 0.0)
        owners = torch.repeat_interleave(lengths)
        return found.new_zeros(len(lengths)).scatter_reduce(0, owners, found, "amax")


class Coverage(_ListMetric):
    """Share of the catalog's V items in at least one list.

    The state is one byte for each item, reduced by maximum. V includes items without training
    events.

    >>> metric = Coverage(k=2, num_items=8)
    >>> metric.update(torch.tensor([[3, 5, 1], [5, -1, -1]]))
    >>> metric.compute().item()
    0.25
    """

    recommended: Tensor

    def __init__(
        self, k: int, num_items: int, process_group: dist.ProcessGroup | None = None
    ) -> None:
        """Starts with no item recommended, for lists of ``k`` out of V = ``num_items`` items."""
        super().__init__(k, process_group)
        self.num_items = num_items
        marks = torch.zeros(num_items, dtype=torch.uint8)
        self.add_state("recommended", marks, dist_reduce_fx="max")

    def update(self, items: Tensor) -> None:
        """Marks the first k items of (B, >= k) lists as recommended."""
        listed = self._lists(items)
        self.recommended[listed[listed >= 0]] = 1

    def compute(self) -> Tensor:
        """() float64 share of the catalog."""
        return self.recommended.count_nonzero().double() / self.num_items


class Surprisal(MeanOverUsers):
    """Rarity of the recommended items: 0 if all users know them, 1 if at most one does.

    As in RePlay, the self-information of an item that u of U training users know is
    log2(U / u) / log2(U), with u at least 1. A user's number is the sum over the list divided by k,
    and the metric is the mean over users.

    >>> metric = Surprisal(k=2, item_users=torch.tensor([8, 4, 1, 0]), num_users=8)
    >>> metric.update(torch.tensor([[0, 1, 3], [2, 3, 0]]))  # (0 + 1/3) / 2 and (1 + 1) / 2
    >>> round(metric.compute().item(), 4)
    0.5833
    """

    surprise: Tensor

    def __init__(
        self,
        k: int,
        item_users: Tensor,
        num_users: int,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Starts with no users.

        Args:
            k: list length.
            item_users: (V,) int64 training users of each item, or its training events if users
                seldom repeat items; limited to ``num_users``.
            num_users: U, number of training users; at least 2.
            process_group: ranks to sum over; None means all.
        """
        super().__init__(k, process_group)
        if num_users < 2:
            raise ValueError(
                f"num_users must be at least 2, got {num_users}; remove this metric, which divides "
                "by the logarithm of the number of users"
            )
        known = item_users.clamp(1, num_users).double()
        scale = torch.tensor(num_users, dtype=torch.float64).log2()
        self.register_buffer("surprise", (num_users / known).log2() / scale, persistent=False)

    def update(self, items: Tensor) -> None:
        """Adds users by their (B, >= k) lists of items; item -1 counts as rarity 0."""
        listed = self._lists(items)
        rarity = self.surprise[listed.clamp(min=0)].where(listed >= 0, 0.0)
        self._add(rarity.sum(1) / self.k)


class PopularityRecall(_ListMetric):
    """Share of targets in the list, separately for head, torso and tail items.

    Buckets are those of `popularity_buckets`. The share is over targets, not users, because one
    user's targets are in several buckets.

    >>> metric = PopularityRecall(k=3, item_counts=torch.tensor([9, 9, 9, 0]))
    >>> metric.update(torch.tensor([0, 5, 2, 8]), torch.tensor([0, 0, 1, 3]))
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'Recall@3/head': 0.5, 'Recall@3/torso': 1.0, 'Recall@3/tail': 0.0}
    """

    found: Tensor
    asked: Tensor
    buckets: Tensor

    def __init__(
        self, k: int, item_counts: Tensor, process_group: dist.ProcessGroup | None = None
    ) -> None:
        """Starts with no targets; takes the (V,) int64 training events of each item."""
        super().__init__(k, process_group)
        self.register_buffer("buckets", popularity_buckets(item_counts), persistent=False)
        for name in ("found", "asked"):
            zeros = torch.zeros(len(BUCKETS), dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, ranks: Tensor, targets: Tensor) -> None:
        """Adds targets, by their (T,) ranks and (T,) items."""
        if ranks.shape != targets.shape:
            raise ValueError(
                f"ranks must be one for each target, got shapes {tuple(ranks.shape)} and "
                f"{tuple(targets.shape)}; pass both in the same order"
            )
        buckets = self.buckets[targets].long()
        self.asked += torch.bincount(buckets, minlength=len(BUCKETS))
        self.found += torch.bincount(buckets[ranks < self.k], minlength=len(BUCKETS))

    def compute(self) -> dict[str, Tensor]:
        """() float64 recall of each bucket, by name; NaN for a bucket without targets."""
        shares = self.found.double() / self.asked
        return {f"Recall@{self.k}/{name}": shares[i] for i, name in enumerate(BUCKETS)}


def popularity_buckets(item_counts: Tensor) -> Tensor:
    """(V,) uint8 bucket of each item: 0 head, 1 torso, 2 tail, each a third of the events.

    Items are sorted by falling count, equal counts by index; an item belongs to the third that
    contains its first event. Items without events are in the tail.

    Args:
        item_counts: (V,) int64 training events of each item.

    >>> popularity_buckets(torch.tensor([1, 6, 0, 3, 2])).tolist()
    [2, 0, 2, 1, 2]
    """
    counts, order = item_counts.long().sort(descending=True, stable=True)
    before = counts.cumsum(0) - counts
    third = (3 * before // counts.sum().clamp(min=1)).masked_fill(counts == 0, 2)
    return torch.empty_like(order).index_copy_(0, order, third).to(torch.uint8)


def _sum_by_user(values: Tensor, lengths: Tensor) -> Tensor:
    sums = values.new_zeros(len(lengths))
    return sums.index_add_(0, torch.repeat_interleave(lengths), values)


def _lengths_of(ranks: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return torch.ones_like(ranks)
    if int(lengths.sum()) != len(ranks):
        raise ValueError(
            f"lengths must add up to the number of ranks, got {int(lengths.sum())} and "
            f"{len(ranks)}; pass one rank for each target"
        )
    return lengths
