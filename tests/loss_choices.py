"""Draws and choices that definitions of losses share, made again the simplest way."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from tests.loss_entry import DRAWN
from torch import Tensor

from shardrec.kernels.negatives import STREAM_MIX, STREAM_NEGATIVES, draw_below, random_signs


def ones(targets: Tensor) -> Tensor:
    """Every position is covered."""
    return torch.ones_like(targets).bool()


def negatives(num_items: int, blocks: Tensor, num_negatives: int) -> Tensor:
    return draw_below(num_items, blocks, num_negatives, stream=STREAM_NEGATIVES, **DRAWN)


def bucket_centres(rule: Any, num_buckets: int, states: Tensor) -> Tensor:
    """(n_b, D) float64: signed sums of the states, or with ``mix=False`` signs alone."""
    draws: dict[str, Any] = {"stream": STREAM_MIX, "seed": rule.seed, "step": rule.step}
    if not rule.mix:
        return random_signs(0, num_buckets, states.shape[1], **draws).double()
    return random_signs(0, len(states), num_buckets, **draws).double().T @ states


def chunks_in_order(buckets: Sequence[int], num_chunks: int) -> list[int]:
    """The chunk of each vector: vectors sorted by bucket, cut into equal chunks."""
    order = sorted(range(len(buckets)), key=lambda one: (buckets[one], one))
    chunk_of = {one: place * num_chunks // len(order) for place, one in enumerate(order)}
    return [chunk_of[one] for one in range(len(order))]


def places_by_bucket(positions: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The k-th of P positions of a bucket has the place of item ``k I / P`` of its I items."""
    starts = [0, *accumulate(sizes)]
    places = []
    for index, bucket in enumerate(positions):
        within = positions[:index].count(bucket)
        place = starts[bucket] + within * sizes[bucket] // positions.count(bucket)
        places.append(min(place, starts[-1] - 1))
    return places


def paired_logits(
    states: Tensor, table: Tensor, targets: Tensor, num_negatives: int
) -> tuple[Tensor, Tensor]:
    """(N,) logits of targets and (N, K) of negatives; in place of the target, the next item."""
    drawn = negatives(len(table), torch.arange(len(states)), num_negatives)
    collides = drawn == targets[:, None]
    logits = states @ table.T
    drawn = torch.where(collides, (drawn + 1) % len(table), drawn)
    return logits.gather(1, targets[:, None])[:, 0], logits.gather(1, drawn)
