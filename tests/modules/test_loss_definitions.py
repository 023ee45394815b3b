"""Every loss is its definition, as a function and as a training step calls it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.every_loss import (
    SCALINGS,
    WEIGHTS,
    assert_equals_truth,
    batch,
    evaluate,
    gradients,
    loss_of,
    names,
    truth,
)
from tests.loss_choices import negatives
from tests.loss_entry import DRAWN
from tests.losses import LOSSES
from torch import Tensor

from shardrec.modules.losses import Step

weighted = pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weights"])
FUNCTIONS = [*LOSSES, *(f"{name}-sparse" for name in names(has_sparse_grad=True))]


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    states, table, targets = batch()
    return states.requires_grad_(), table.requires_grad_(), targets


def tolerance_of(case: str, scaling: str) -> float:
    """A log-sum-exp is stored as one float: of large logits that is less exact."""
    is_stored = LOSSES[case.partition("-")[0]].is_operator
    return 2e-4 if is_stored and scaling == "saturated" else 2e-5


def found_by(case: str, **options: Any) -> list[Tensor]:
    """Value and gradients of a function."""
    states, table, targets = leaves()
    return gradients(loss_of(case, states, table, targets, **options), states, table)


@pytest.mark.parametrize("scaling", SCALINGS)
@weighted
@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_loss_is_its_definition_in_every_reduction(
    case: str, weights: Tensor | None, scaling: str
) -> None:
    normalize, temperature = SCALINGS[scaling]
    options: dict[str, Any] = {"normalize": normalize, "temperature": temperature}
    for reduction in ("none", "mean", "sum"):
        chosen = options | {"weights": weights, "reduction": reduction}
        expected = truth(case, **chosen)
        assert_equals_truth(found_by(case, **chosen), expected, tolerance_of(case, scaling))


@pytest.mark.parametrize("scaling", SCALINGS)
@weighted
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_training_step_is_the_mean_of_its_definition(
    name: str, weights: Tensor | None, scaling: str
) -> None:
    normalize, temperature = SCALINGS[scaling]
    options: dict[str, Any] = {"normalize": normalize, "temperature": temperature}
    states, table, targets = leaves()
    loss = LOSSES[name].config(**LOSSES[name].options, **options)
    output = loss(states, table, targets, weights=weights, step=Step(**DRAWN))
    expected = truth(name, weights=weights, **options)
    found = gradients(output.loss, states, table)
    assert_equals_truth(found, expected, tolerance_of(name, scaling))


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if "num_negatives" in LOSSES[name].options]
)
def test_some_draws_of_the_batch_collide_with_their_targets(name: str) -> None:
    options, (_, table, targets) = LOSSES[name].options, batch()
    num_blocks = -(-len(targets) // options.get("share", 1))
    drawn = negatives(len(table), torch.arange(len(targets)) % num_blocks, options["num_negatives"])
    assert (drawn == targets[:, None]).any()


@weighted
@pytest.mark.parametrize("name", names(has_covered=True))
def test_positions_without_candidates_are_not_covered_whatever_their_weights(
    name: str, weights: Tensor | None
) -> None:
    entry, inputs = LOSSES[name], batch()
    _, expected = entry.definition(*inputs, **entry.options)
    assert 0 < int(expected.sum()) < len(expected), "all positions or none are covered"
    _, covered = evaluate(name, *inputs, reduction="none", weights=weights)
    assert covered is not None and torch.equal(covered, expected)
    output = entry.config(**entry.options)(*inputs, weights=weights, step=Step(**DRAWN))
    share = pytest.approx(int(expected.sum()) / len(expected))
    assert output.statistics == {"covered_share": share}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_weights_that_are_all_zero_give_loss_zero_and_no_gradient(case: str) -> None:
    assert not any(one.any() for one in found_by(case, weights=torch.zeros(60)))


@pytest.mark.parametrize("calibration", [0.0, 0.5, 1.0])
def test_the_calibration_of_gbce_is_the_power_of_the_positive_probability(
    calibration: float,
) -> None:
    expected = truth("gbce", calibration=calibration)
    assert_equals_truth(found_by("gbce", calibration=calibration), expected)


def test_sizes_that_are_not_given_follow_from_the_batch() -> None:
    inputs = batch()  # 60 positions, 83 items

    def mean(name: str, **sizes: Any) -> Tensor:
        loss = LOSSES[name].function(*inputs, **sizes, seed=0)
        assert isinstance(loss, Tensor)
        return loss

    sizes = {"num_buckets": 15, "positions_per_bucket": 15, "items_per_bucket": 256}
    assert mean("sce") == mean("sce", **sizes)  # 2 sqrt(60)
    sizes = {"num_buckets": 15, "num_chunks": 15, "num_rounds": 4, "num_neighbor_chunks": 0}
    assert mean("rece", num_neighbor_chunks=0) == mean("rece", **sizes)  # sqrt(4 60)
    sizes = {"num_buckets": 27, "num_chunks": 27, "num_rounds": 4, "num_neighbor_chunks": 1}
    assert mean("rece") == mean("rece", **sizes)  # sqrt(4 60 3)


# A mean and "none" take their gradients at different times where one is taken in forward.
BITS = [
    (name, reduction)
    for name, loss in LOSSES.items()
    for reduction in (("mean", "none") if loss.in_forward else ("mean",))
]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("name", "reduction"), BITS)
def test_the_same_batch_gives_the_same_bits(name: str, reduction: str, num_threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, 32, generator=generator).requires_grad_()
    table = torch.randn(1500, 32, generator=generator).requires_grad_()
    # Few items are the targets of many positions, whose gradients are added in some order.
    targets = torch.randint(0, 20, (600,), generator=generator)
    former = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        once, again = (
            gradients(loss_of(name, states, table, targets, reduction=reduction), states, table)
            for _ in range(2)
        )
    finally:
        torch.set_num_threads(former)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


def test_autocast_changes_no_logit_of_the_stored_softmax() -> None:
    inputs = batch()
    expected = loss_of("eager_ce", *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of("eager_ce", *inputs), expected)
