"""The hybrid loss alone: its sum inside the logarithm is unbiased, and exact without a tail."""

from typing import Any

import torch
from tests.every_loss import batch

from shardrec.kernels import cut_cross_entropy, hybrid_cross_entropy, scalable_cross_entropy

HARD: dict[str, Any] = {"num_buckets": 5, "items_per_bucket": 10}


def test_with_every_item_among_the_hard_ones_it_is_the_full_softmax() -> None:
    states, table, targets = batch()
    found = hybrid_cross_entropy(
        states, table, targets, items_per_bucket=len(table), num_negatives=1, seed=0
    )
    torch.testing.assert_close(found, cut_cross_entropy(states, table, targets))


def test_the_sum_inside_the_logarithm_is_unbiased() -> None:
    states, table, targets = batch()
    exact = cut_cross_entropy(states, table, targets, reduction="none").exp()
    sums = torch.stack(
        [
            hybrid_cross_entropy(
                states, table, targets, **HARD, num_negatives=16, seed=seed, reduction="none"
            ).exp()
            for seed in range(200)
        ]
    )
    deviations = (sums.mean(0) - exact) / (sums.std(0) / len(sums) ** 0.5)
    # Of 60 standard normal numbers the mean is within 4 / sqrt(60), the largest within 4.5.
    assert float(deviations.mean().abs()) < 0.52
    assert float(deviations.abs().max()) < 4.5


def test_without_the_tail_the_same_sum_is_too_small() -> None:
    states, table, targets = batch()
    exact = cut_cross_entropy(states, table, targets, reduction="none")
    found = scalable_cross_entropy(
        states, table, targets, **HARD, positions_per_bucket=60, seed=0, reduction="none"
    )
    assert isinstance(found, tuple)
    assert bool((found[0] < exact).all()), "hard items alone leave terms out"
