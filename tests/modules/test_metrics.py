"""Metrics equal brute force over a small catalog, ties included, on any number of ranks."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.group_traffic import counted_traffic
from tests.ranks import Ranks
from torch import Tensor
from torchmetrics import MetricCollection

from shardrec.kernels.shard import RowShard
from shardrec.modules.metrics import (
    MRR,
    NDCG,
    Coverage,
    HitRate,
    MeanOverUsers,
    PopularityRecall,
    Recall,
    Surprisal,
    combine_ranks,
    popularity_buckets,
    ranking_metrics,
)
from shardrec.modules.ranking import Ragged, ranks_in_lists, tie_keys, top_items

KS = (1, 3, 10)
NUM_TRAIN_USERS = 12


@dataclass(frozen=True)
class World:
    """Whole numbers, so that scores are exact and often equal."""

    states: Tensor
    table: Tensor
    targets: Ragged
    item_counts: Tensor


def make_world(num_users: int = 17, num_items: int = 23) -> World:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 5, (num_users,), generator=generator)
    rows = [torch.randperm(num_items, generator=generator)[:n] for n in lengths.tolist()]
    return World(
        states=torch.randint(-2, 3, (num_users, 4), generator=generator).float(),
        table=torch.randint(-2, 3, (num_items, 4), generator=generator).float(),
        targets=(torch.cat(rows), lengths),
        item_counts=torch.randint(0, 9, (num_items,), generator=generator),
    )


def brute_force(world: World, k: int) -> dict[str, float]:
    """Definitions written with Python lists and sets, one user at a time."""
    num_items = len(world.table)
    counts = world.item_counts.tolist()
    sums = dict.fromkeys(("NDCG", "Recall", "HitRate", "MRR", "Surprisal"), 0.0)
    covered: set[int] = set()
    found, asked = [0, 0, 0], [0, 0, 0]
    buckets = brute_buckets(counts)
    asking = 0
    for user, targets in enumerate(world.targets[0].split(world.targets[1].tolist())):
        scores = (world.table @ world.states[user]).tolist()
        keys = tie_keys(torch.arange(num_items)).tolist()
        listed = sorted(range(num_items), key=lambda item: (-scores[item], keys[item]))[:k]
        covered |= set(listed)
        known = [min(max(counts[item], 1), NUM_TRAIN_USERS) for item in listed]
        sums["Surprisal"] += sum(math.log(NUM_TRAIN_USERS / u, NUM_TRAIN_USERS) for u in known) / k
        wanted = set(targets.tolist())
        hits = [place for place, item in enumerate(listed) if item in wanted]
        for item in wanted:
            asked[buckets[item]] += 1
            found[buckets[item]] += item in listed
        if not wanted:
            continue
        asking += 1
        perfect = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
        sums["NDCG"] += sum(1 / math.log2(place + 2) for place in hits) / perfect
        sums["Recall"] += len(hits) / len(wanted)
        sums["HitRate"] += bool(hits)
        sums["MRR"] += 1 / (1 + hits[0]) if hits else 0.0
    surprisal = sums.pop("Surprisal") / len(world.states)
    result = {f"{name}@{k}": total / asking for name, total in sums.items()}
    result |= {f"Surprisal@{k}": surprisal, f"Coverage@{k}": len(covered) / num_items}
    for bucket, name in enumerate(("head", "torso", "tail")):
        result[f"Recall@{k}/{name}"] = found[bucket] / asked[bucket]
    return result


def brute_buckets(counts: list[int]) -> list[int]:
    buckets, before = [2] * len(counts), 0
    for item in sorted(range(len(counts)), key=lambda item: (-counts[item], item)):
        if counts[item]:
            buckets[item] = int(before >= sum(counts) / 3) + int(before >= sum(counts) * 2 / 3)
        before += counts[item]
    return buckets


def measure(world: World, row_edges: list[int], user_edges: list[int]) -> dict[str, float]:
    """What one rank reports after it has seen its users in batches of four."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    group = dist.group.WORLD if dist.is_initialized() else None
    low, high = row_edges[rank : rank + 2]
    shard = RowShard(world.table[low:high], low, len(world.table), group)
    metrics = ranking_metrics(
        KS, num_items=len(world.table), item_counts=world.item_counts, num_users=NUM_TRAIN_USERS
    )
    first, last = user_edges[rank : rank + 2]
    offsets = [0, *world.targets[1].cumsum(0).tolist()]
    most = max(b - a for a, b in zip(user_edges, user_edges[1:], strict=False))
    for start in range(first, first + most, 4):  # ranks without users left still take part
        start, stop = min(start, last), min(start + 4, last)
        lengths = world.targets[1][start:stop]
        targets = world.targets[0][offsets[start] : offsets[stop]]
        _, items = top_items(world.states[start:stop], shard, max(KS))
        ranks = ranks_in_lists(items, (targets, lengths), missing=len(world.table))
        metrics.update(ranks=ranks, lengths=lengths, targets=targets, items=items)
    assert_combined_alike(metrics, group)
    return {name: value.item() for name, value in metrics.compute().items()}


def assert_combined_alike(metrics: MetricCollection, group: dist.ProcessGroup | None) -> None:
    """Combined at once the metrics are bit by bit those that torchmetrics gathers one by one."""
    combined = copy.deepcopy(metrics)
    combine_ranks(list(combined.values()), group)
    with counted_traffic() as traffic:
        found = combined.compute()
        found |= {name: one.standard_error() for name, one in means(combined)}
    assert not traffic
    expected = copy.deepcopy(metrics).compute()
    expected |= {name: one.standard_error() for name, one in means(metrics)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


def means(metrics: MetricCollection) -> list[tuple[str, MeanOverUsers]]:
    return [(f"{n} error", one) for n, one in metrics.items() if isinstance(one, MeanOverUsers)]


@pytest.mark.parametrize(
    ("row_edges", "user_edges"),
    [([0, 23], [0, 17]), ([0, 9, 23], [0, 17, 17]), ([0, 12, 23, 23], [0, 3, 9, 17])],
    ids=["W1", "W2", "W3"],
)
def test_metrics_equal_brute_force_on_every_number_of_ranks(
    ranks: Ranks, row_edges: list[int], user_edges: list[int]
) -> None:
    world = make_world()
    expected = {name: value for k in KS for name, value in brute_force(world, k).items()}
    for reported in ranks(len(row_edges) - 1).run(measure, world, row_edges, user_edges):
        assert reported == pytest.approx(expected, rel=1e-12, abs=1e-12)


def standard_errors(ranks_of_targets: list[list[int]]) -> list[float]:
    """Of every metric of targets, when the ranks of a group have these users."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = torch.tensor(ranks_of_targets[rank], dtype=torch.int64)
    metrics = [kind(3) for kind in (NDCG, Recall, HitRate, MRR)]
    for metric in metrics:
        metric.update(own)
    return [metric.standard_error().item() for metric in metrics]


def test_standard_errors_are_those_of_numpy_on_every_number_of_ranks(ranks: Ranks) -> None:
    users = [0, 2, 7, 1, 9, 9, 0, 1]
    gains = [1 / math.log2(rank + 2) if rank < 3 else 0.0 for rank in users]
    hits = [float(rank < 3) for rank in users]
    inverse = [1 / (rank + 1) if rank < 3 else 0.0 for rank in users]
    expected = [
        np.std(values, ddof=1) / math.sqrt(len(users)) for values in (gains, hits, hits, inverse)
    ]
    assert standard_errors([users]) == pytest.approx(expected)
    for found in ranks(2).run(standard_errors, [users[:7], users[7:]]):
        assert found == pytest.approx(expected)
    for found in ranks(3).run(standard_errors, [users[:3], [], users[3:]]):
        assert found == pytest.approx(expected)
    assert all(math.isnan(error) for error in standard_errors([[0]]))


def test_metrics_work_without_a_process_group() -> None:
    world = make_world()
    expected = {name: value for k in KS for name, value in brute_force(world, k).items()}
    assert measure(world, [0, 23], [0, 17]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_recall_and_hit_rate_differ_with_several_targets_and_agree_with_one() -> None:
    ranks, lengths = torch.tensor([0, 7, 8, 1]), torch.tensor([3, 1])
    recall, hit_rate = Recall(5), HitRate(5)
    assert recall(ranks, lengths).item() == pytest.approx((1 / 3 + 1) / 2)
    assert hit_rate(ranks, lengths).item() == 1.0
    assert Recall(5)(ranks).item() == HitRate(5)(ranks).item() == 0.5


def test_a_perfect_list_scores_one_with_more_targets_than_places() -> None:
    ranks, lengths = torch.arange(6), torch.tensor([6])
    assert NDCG(4)(ranks, lengths).item() == pytest.approx(1.0)
    assert MRR(4)(ranks, lengths).item() == 1.0
    assert Recall(4)(ranks, lengths).item() == pytest.approx(4 / 6)


def test_users_without_targets_are_left_out() -> None:
    ranks, lengths = torch.tensor([0]), torch.tensor([0, 1, 0])
    for metric in (NDCG(2), Recall(2), HitRate(2), MRR(2)):
        assert metric(ranks, lengths).item() == 1.0


def test_a_mean_over_nobody_is_not_a_number() -> None:
    nobody = torch.zeros(0, dtype=torch.int64)
    for metric in (NDCG(2), Recall(2), HitRate(2), MRR(2)):
        assert metric(nobody, nobody).isnan()
    buckets = PopularityRecall(1, torch.tensor([5, 0]))
    buckets.update(nobody, nobody)
    assert all(value.isnan() for value in buckets.compute().values())


def test_metrics_of_different_k_are_not_merged() -> None:
    metrics = ranking_metrics((5, 10), num_items=4, item_counts=torch.ones(4), num_users=4)
    one = torch.ones(1, dtype=torch.int64)
    items = torch.full((1, 10), -1)
    # Equal sums after the first update, unlike after the second.
    metrics.update(ranks=one - 1, lengths=one, targets=one, items=items)
    metrics.update(ranks=one + 6, lengths=one, targets=one, items=items)
    values = metrics.compute()
    assert (values["HitRate@5"].item(), values["HitRate@10"].item()) == (0.5, 1.0)


def test_reset_forgets_everything() -> None:
    coverage = Coverage(1, 4)
    coverage.update(torch.tensor([[1]]))
    coverage.reset()
    coverage.update(torch.tensor([[2], [2]]))
    assert coverage.compute().item() == 0.25


def test_counts_beyond_float_precision_stay_exact() -> None:
    metric = PopularityRecall(1, torch.tensor([1]))
    metric.asked += 2**60
    metric.update(torch.tensor([0]), torch.tensor([0]))
    assert metric.asked[0].item() == 2**60 + 1
    large = torch.tensor([2**24 + 1, 2**24, 2**24])
    assert popularity_buckets(large).tolist() == [0, 1, 2]  # 2**25 + 1 is above two thirds


def test_buckets_hold_a_third_of_the_events_each_and_unseen_items_are_tail() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        counts = torch.randint(0, 6, (11,), generator=generator)
        assert popularity_buckets(counts).tolist() == brute_buckets(counts.tolist())
    assert popularity_buckets(torch.zeros(3, dtype=torch.int64)).tolist() == [2, 2, 2]


def test_surprisal_is_zero_for_what_all_know_and_one_for_what_nobody_knows() -> None:
    metric = Surprisal(1, torch.tensor([100, 1, 0, 400]), num_users=100)
    assert metric(torch.tensor([[0]])).item() == 0.0
    assert metric(torch.tensor([[1], [2]])).item() == 1.0
    assert metric(torch.tensor([[3]])).item() == 0.0  # more events than users


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NDCG(0), "k must be at least 1, got 0"),
        (lambda: Surprisal(1, torch.ones(2), num_users=1), "num_users must be at least 2, got 1"),
        (lambda: Coverage(3, 5).update(torch.zeros(2, 2)), r"items must be of shape \(B, 3\)"),
        (
            lambda: Recall(1).update(torch.zeros(3), torch.tensor([1, 1])),
            "lengths must add up to the number of ranks, got 2 and 3",
        ),
        (
            lambda: PopularityRecall(1, torch.ones(2)).update(torch.zeros(1), torch.zeros(2)),
            "ranks must be one for each target",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()
