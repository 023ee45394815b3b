"""Every loss as a training step calls it: its options reach it, and what it says is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels import loss_definitions
from tests.kernels.loss_definitions import DEFINITIONS, DRAWN, OPTIONS
from torch import Tensor

from shardrec.modules.losses import LOSSES, LossOutput, Step

WEIGHTS = torch.linspace(0.0, 2.0, 60)
SCALINGS = {"plain": (False, 1.0), "warm": (False, 2.5), "cosine": (True, 0.1)}


def computed(name: str, weights: Tensor | None, **options: Any) -> tuple[LossOutput, list[Tensor]]:
    states, table, targets = loss_definitions.batch()
    states.requires_grad_(), table.requires_grad_()
    loss = LOSSES[name](**OPTIONS[name], **options)
    output = loss(states, table, targets, weights=weights, step=Step(**DRAWN))
    return output, loss_definitions.gradients(output.loss, states, table)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weights"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_step_is_the_mean_of_its_definition(
    name: str, weights: Tensor | None, scaling: str
) -> None:
    normalize, temperature = SCALINGS[scaling]
    options: dict[str, Any] = {"normalize": normalize, "temperature": temperature}
    _, found = computed(name, weights, **options)
    expected = loss_definitions.truth(DEFINITIONS[name], weights=weights, **options)
    loss_definitions.assert_equals_truth(found, expected)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["even", "weights"])
def test_the_covered_share_of_sce_counts_positions_whatever_their_weights(
    weights: Tensor | None,
) -> None:
    _, covered = loss_definitions.sce(*loss_definitions.batch())
    output, _ = computed("sce", weights)
    assert output.statistics == {"covered_share": pytest.approx(int(covered.sum()) / 60)}
