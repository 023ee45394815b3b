"""Reduction, weights, temperature and unit length: every loss keeps its definition with each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels import loss_definitions
from tests.kernels.loss_definitions import DEFINITIONS, DRAWN, OPTIONS, WEIGHTS
from torch import Tensor

from shardrec.kernels import (
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)

FUNCTIONS: dict[str, Any] = {
    "cce": cut_cross_entropy,
    "cce_minus": sampled_cross_entropy,
    "sce": scalable_cross_entropy,
    "rece": reduced_cross_entropy,
}
CASES = [*FUNCTIONS, "cce_minus-sparse", "sce-sparse"]
SCALINGS = loss_definitions.SCALINGS | {"warm": (False, 2.5)}


def computed(case: str, **options: Any) -> tuple[list[Tensor], Tensor | None]:
    """Value and gradients of our loss, and the covered positions where it says them."""
    name, _, is_sparse = case.partition("-")
    states, table, targets = loss_definitions.batch()
    states.requires_grad_(), table.requires_grad_()
    options |= OPTIONS[name] | ({"sparse_grad": True} if is_sparse else {})
    options |= {} if name == "cce" else DRAWN
    loss = FUNCTIONS[name](states, table, targets, **options)
    covered = None
    if isinstance(loss, tuple):
        loss, covered = loss
    return loss_definitions.gradients(loss, states, table), covered


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weights"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_a_loss_is_its_definition_with_every_option(
    case: str, reduction: str, weights: Tensor | None, scaling: str
) -> None:
    normalize, temperature = SCALINGS[scaling]
    options: dict[str, Any] = {"normalize": normalize, "temperature": temperature}
    options |= {"weights": weights, "reduction": reduction}
    found, _ = computed(case, **options)
    definition = DEFINITIONS[case.partition("-")[0]]
    loss_definitions.assert_equals_truth(found, loss_definitions.truth(definition, **options))


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weights"])
def test_the_covered_positions_of_sce_are_those_in_a_bucket(weights: Tensor | None) -> None:
    states, table, targets = loss_definitions.batch()
    _, expected = loss_definitions.sce(states, table, targets)
    _, covered = computed("sce", reduction="none", weights=weights)
    assert covered is not None and torch.equal(covered, expected)


@pytest.mark.parametrize("case", CASES)
def test_weights_that_are_all_zero_give_loss_zero_and_no_gradient(case: str) -> None:
    found, _ = computed(case, weights=torch.zeros(60))
    assert not any(one.any() for one in found)


def test_sizes_that_are_not_given_follow_from_the_batch() -> None:
    inputs = loss_definitions.batch()  # 60 positions, 83 items
    sce = scalable_cross_entropy(*inputs, seed=0)
    sizes: dict[str, Any] = {"num_buckets": 15, "positions_per_bucket": 15, "items_per_bucket": 256}
    assert sce == scalable_cross_entropy(*inputs, **sizes, seed=0)  # 2 sqrt(60)
    rece = reduced_cross_entropy(*inputs, num_neighbor_chunks=0, seed=0)
    sizes = {"num_buckets": 15, "num_chunks": 15, "num_rounds": 4, "num_neighbor_chunks": 0}
    assert rece == reduced_cross_entropy(*inputs, **sizes, seed=0)  # sqrt(4 60)
    sizes = {"num_buckets": 27, "num_chunks": 27, "num_rounds": 4, "num_neighbor_chunks": 1}
    rece = reduced_cross_entropy(*inputs, seed=0)
    assert rece == reduced_cross_entropy(*inputs, **sizes, seed=0)  # sqrt(4 60 3)


def bits_of(case: str, states: Tensor, table: Tensor, targets: Tensor) -> list[Tensor]:
    name, reduction = case.split("-")
    options: dict[str, Any] = {} if name == "cce" else {"seed": 0}
    options |= {"num_negatives": 64} if name == "cce_minus" else {}
    loss = FUNCTIONS[name](states, table, targets, reduction=reduction, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return loss_definitions.gradients(loss, states, table)


# A mean and "none" take their gradients at different times in these two.
BITS = ["cce-mean", "cce-none", "cce_minus-mean", "cce_minus-none", "sce-mean", "rece-mean"]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("case", BITS)
def test_the_same_batch_gives_the_same_bits(case: str, num_threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, 32, generator=generator).requires_grad_()
    table = torch.randn(1500, 32, generator=generator).requires_grad_()
    # Few items are the targets of many positions, whose gradients are added in some order.
    targets = torch.randint(0, 20, (600,), generator=generator)
    former = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        once, again = (bits_of(case, states, table, targets) for _ in range(2))
    finally:
        torch.set_num_threads(former)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
