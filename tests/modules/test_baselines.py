"""The losses of others, which ours are compared with, are what their papers say."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tests.kernels import loss_definitions
from tests.kernels.loss_definitions import DEFINITIONS, DRAWN, OPTIONS, WEIGHTS
from torch import Tensor

from shardrec.modules.baselines import (
    binary_cross_entropy,
    eager_cross_entropy,
    generalized_binary_cross_entropy,
)

FUNCTIONS: dict[str, Any] = {
    "eager_ce": eager_cross_entropy,
    "bce": partial(binary_cross_entropy, **DRAWN),
    "gbce": partial(generalized_binary_cross_entropy, **DRAWN),
}
SCALINGS = loss_definitions.SCALINGS | {"saturated": (False, 0.01)}


def computed(name: str, **options: Any) -> list[Tensor]:
    states, table, targets = loss_definitions.batch()
    states.requires_grad_(), table.requires_grad_()
    loss = FUNCTIONS[name](states, table, targets, **OPTIONS[name], **options)
    return loss_definitions.gradients(loss, states, table)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weights"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_baseline_is_its_definition_with_every_option(
    name: str, reduction: str, weights: Tensor | None, scaling: str
) -> None:
    normalize, temperature = SCALINGS[scaling]
    options: dict[str, Any] = {"normalize": normalize, "temperature": temperature}
    options |= {"weights": weights, "reduction": reduction}
    expected = loss_definitions.truth(DEFINITIONS[name], **options)
    loss_definitions.assert_equals_truth(computed(name, **options), expected)


@pytest.mark.parametrize("calibration", [0.0, 0.5, 1.0])
def test_the_calibration_of_gbce_is_the_power_of_the_positive_probability(
    calibration: float,
) -> None:
    definition = partial(loss_definitions.gbce, calibration=calibration)
    expected = loss_definitions.truth(definition)
    loss_definitions.assert_equals_truth(computed("gbce", calibration=calibration), expected)


@pytest.mark.parametrize("name", ["bce", "gbce"])
def test_no_negatives_are_refused(name: str) -> None:
    states, table, targets = loss_definitions.batch()
    with pytest.raises(ValueError, match="num_negatives must be at least 1, got 0; raise it"):
        FUNCTIONS[name](states, table, targets, num_negatives=0)


def test_autocast_changes_no_logit_of_the_full_softmax() -> None:
    states, table, targets = loss_definitions.batch()
    states, table = states.float(), table.float()
    expected = eager_cross_entropy(states, table, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(eager_cross_entropy(states, table, targets), expected)
