"""The losses by their definitions: what is chosen is chosen again here, sums are float64.

Only the random draws and signs come from the package; they are tested on their own. Each definition
takes states and rows as products do, after ``scaled``, and gives the (N,) losses and which
positions are covered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardrec.kernels.negatives import (
    STREAM_HASH,
    STREAM_MIX,
    STREAM_NEGATIVES,
    draw_below,
    random_signs,
)
from shardrec.kernels.reference import (
    cross_entropy_reference,
    reduced_cross_entropy_reference,
    sampled_cross_entropy_reference,
    scalable_cross_entropy_reference,
)
from shardrec.kernels.select.reference import topk_rows_reference

Definition = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

DRAWN: dict[str, Any] = {"seed": 3, "step": 2}
WEIGHTS = torch.linspace(0.0, 2.0, 60)
# Names of (normalize, temperature).
SCALINGS = {"plain": (False, 1.0), "unit": (True, 1.0), "cosine": (True, 0.1)}
OPTIONS: dict[str, dict[str, Any]] = {
    "cce": {},
    "cce_minus": {"num_negatives": 9, "share": 8},
    "sce": {"num_buckets": 5, "positions_per_bucket": 7, "items_per_bucket": 23},
    "rece": {"num_buckets": 12, "num_chunks": 10, "num_rounds": 3, "num_neighbor_chunks": 1},
    "eager_ce": {},
    "bce": {"num_negatives": 3},
    "gbce": {"num_negatives": 7},
}


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """60 states and 83 rows of width 12, float32, and targets of which some share an item."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(60, 12, generator=generator)
    table = torch.randn(83, 12, generator=generator)
    return states, table, torch.randint(0, 83, (60,), generator=generator)


def scaled(
    states: Tensor, table: Tensor, normalize: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    """States and rows as products take them."""
    if normalize:
        states = states / states.square().sum(1, keepdim=True).sqrt()
        table = table / table.square().sum(1, keepdim=True).sqrt()
    return states / temperature, table


def reduced(losses: Tensor, covered: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """Weighted losses, their sum, or that over the sum of the weights that are covered."""
    factors = covered.double() if weights is None else covered * weights.double()
    if reduction == "none":
        return losses * factors
    return (losses * factors).sum() / (factors.sum() if reduction == "mean" else 1)


def cce(states: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy_reference(states, table, targets), torch.ones_like(targets).bool()


def negatives(num_items: int, blocks: Tensor, num_negatives: int) -> Tensor:
    return draw_below(num_items, blocks, num_negatives, stream=STREAM_NEGATIVES, **DRAWN)


def cce_minus(states: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    num_negatives, share = OPTIONS["cce_minus"].values()
    num_items, num_blocks = len(table), -(-len(states) // share)
    drawn = negatives(num_items, torch.arange(len(states)) % num_blocks, num_negatives)
    assert (drawn == targets[:, None]).any(), "no draw collides with a target"
    corrections = torch.full(drawn.shape, num_negatives / num_items).double().log()
    losses = sampled_cross_entropy_reference(states, table, targets, drawn, corrections)
    return losses, torch.ones_like(targets).bool()


def sce(states: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    num_buckets, positions_per_bucket, items_per_bucket = OPTIONS["sce"].values()
    signs = random_signs(0, len(states), num_buckets, stream=STREAM_MIX, **DRAWN)
    centres = signs.double().T @ states.detach().double()
    positions = topk_rows_reference(centres, states.detach(), positions_per_bucket)[1]
    items = topk_rows_reference(centres, table.detach(), items_per_bucket)[1]
    covered = torch.zeros(len(states), dtype=torch.bool)
    covered[positions.flatten()] = True
    assert 0 < int(covered.sum()) < covered.numel(), "all positions or none are covered"
    return scalable_cross_entropy_reference(states, table, targets, positions, items), covered


def rece(states: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    num_buckets, num_chunks, num_rounds, reach = OPTIONS["rece"].values()
    of_positions, of_items = [], []
    for index in range(num_rounds):
        signs = random_signs(
            0, num_buckets, states.shape[1], stream=STREAM_HASH + index, **DRAWN
        ).double()
        position_buckets, item_buckets = (
            (vectors.detach().double() @ signs.T).argmax(1).tolist() for vectors in (states, table)
        )
        places = places_by_bucket(position_buckets, item_buckets)
        of_positions.append([place * num_chunks // len(table) for place in places])
        order = sorted(range(len(table)), key=lambda item: (item_buckets[item], item))
        chunk_of = {item: place * num_chunks // len(table) for place, item in enumerate(order)}
        of_items.append([chunk_of[item] for item in range(len(table))])
    losses = reduced_cross_entropy_reference(
        states, table, targets, torch.tensor(of_positions).T, torch.tensor(of_items).T, reach
    )
    return losses, torch.ones_like(targets).bool()


def places_by_bucket(positions: Sequence[int], items: Sequence[int]) -> list[int]:
    """Where the k-th of P positions of a bucket stands: beside item ``k I / P`` of its I items."""
    sizes = [items.count(bucket) for bucket in range(max([*positions, *items]) + 1)]
    starts = [0, *accumulate(sizes)]
    places = []
    for index, bucket in enumerate(positions):
        within = positions[:index].count(bucket)
        place = starts[bucket] + within * sizes[bucket] // positions.count(bucket)
        places.append(min(place, len(items) - 1))
    return places


def paired_logits(
    states: Tensor, table: Tensor, targets: Tensor, num_negatives: int
) -> tuple[Tensor, Tensor]:
    """(N,) logits of targets and (N, K) of negatives; one equal to the target is the next item."""
    drawn = negatives(len(table), torch.arange(len(states)), num_negatives)
    collides = drawn == targets[:, None]
    assert collides.any(), "no draw collides with a target"
    logits = states @ table.T
    drawn = torch.where(collides, (drawn + 1) % len(table), drawn)
    return logits.gather(1, targets[:, None])[:, 0], logits.gather(1, drawn)


def bce(states: Tensor, table: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    positive, negative = paired_logits(states, table, targets, OPTIONS["bce"]["num_negatives"])
    losses = -F.logsigmoid(positive) - F.logsigmoid(-negative).mean(1)
    return losses, torch.ones_like(targets).bool()


def gbce(
    states: Tensor, table: Tensor, targets: Tensor, calibration: float = 0.75
) -> tuple[Tensor, Tensor]:
    """The positive probability to the power ``t (alpha - 1) + 1``."""
    num_negatives = OPTIONS["gbce"]["num_negatives"]
    positive, negative = paired_logits(states, table, targets, num_negatives)
    power = calibration * (num_negatives / (len(table) - 1) - 1) + 1
    losses = -power * F.logsigmoid(positive) - F.logsigmoid(-negative).sum(1)
    return losses, torch.ones_like(targets).bool()


DEFINITIONS: dict[str, Definition] = {
    "cce": cce,
    "cce_minus": cce_minus,
    "sce": sce,
    "rece": rece,
    "eager_ce": cce,
    "bce": bce,
    "gbce": gbce,
}


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The loss, and the dense gradients of a sum that weighs positions and counts thrice."""
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype) if loss.dim() else 1
    found = torch.autograd.grad(3 * (loss * upstream).sum(), inputs)
    return [loss.detach(), *(one.to_dense() if one.is_sparse else one for one in found)]


def truth(
    definition: Definition,
    *,
    normalize: bool = False,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> list[Tensor]:
    """Value and gradients of states and table, float64, of the loss of ``batch()``."""
    states, table, targets = batch()
    states, table = states.double().requires_grad_(), table.double().requires_grad_()
    exact, rows = scaled(states, table, normalize, temperature)
    losses, covered = definition(exact, rows, targets)
    return gradients(reduced(losses, covered, weights, reduction), states, table)


def assert_equals_truth(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """As exact as float32 sums of such logits are, relative to the largest number."""
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == right.shape
        assert right.any(), "a zero shows nothing"
        error = float((ours.double() - right).abs().max() / right.abs().max())
        assert error < 2e-5, f"{error:.3g} of the largest value"
