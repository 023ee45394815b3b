"""Options of the losses: refused where no batch could be trained with them, and where not, used."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from tests.losses import LOSSES

from shardrec.modules import losses
from shardrec.modules.losses import RECE, SCE, CCEMinus, Loss, Step

BAD = [
    (name, option, value)
    for name, loss in LOSSES.items()
    for option, values in {
        "temperature": (0, -1.0, math.nan, math.inf),
        **loss.refused_options,
    }.items()
    for value in values
]


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_an_option_that_no_batch_could_be_trained_with_is_refused_by_name(
    name: str, option: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^loss\.{option} must be .*, got '?{value}'?; \w+"):
        LOSSES[name].config(**{option: value})


def test_every_option_has_a_rule() -> None:
    for name, loss in LOSSES.items():
        options = {one.name for one in dataclasses.fields(loss.config)}
        free = {one.name for one in dataclasses.fields(loss.config) if not one.metadata}
        assert all(isinstance(getattr(loss.config(), option), bool) for option in free), free
        tried = {option for of, option, _ in BAD if of == name}
        assert tried == options - free, "each rule is tried above"


def test_every_loss_of_training_has_an_entry_for_tests() -> None:
    assert {name: loss.config for name, loss in LOSSES.items()} == losses.LOSSES


NUM_POSITIONS, NUM_ITEMS = 9, 7


@pytest.mark.parametrize(
    "loss",
    [
        CCEMinus(num_negatives=1, share=1000),
        CCEMinus(num_negatives=1, proposal="mixed"),
        CCEMinus(num_negatives=1000, share=1, proposal="in_batch"),
        CCEMinus(num_negatives=3, proposal="popularity", popularity_exponent=0),
        CCEMinus(num_negatives=3, proposal="popularity", popularity_exponent=10),
        SCE(num_buckets=100, positions_per_bucket=1000, items_per_bucket=1000),
        SCE(num_buckets=1, positions_per_bucket=1, items_per_bucket=1),
        RECE(num_buckets=100, num_chunks=100, num_rounds=1, num_neighbor_chunks=0),
        RECE(num_buckets=1, num_chunks=3, num_rounds=40, num_neighbor_chunks=1000),
    ],
    ids=lambda loss: repr(loss).replace("normalize=False, temperature=1.0, ", ""),
)
def test_more_than_there_is_and_the_least_that_is_allowed_train(loss: Loss) -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(NUM_POSITIONS, 4, generator=generator).requires_grad_()
    table = torch.randn(NUM_ITEMS, 4, generator=generator).requires_grad_()
    targets = torch.arange(NUM_POSITIONS) % NUM_ITEMS
    counts = torch.full((NUM_ITEMS,), 10**12)
    output = loss(states, table, targets, step=Step(seed=0, step=0, item_counts=counts))
    output.loss.backward()
    assert states.grad is not None and table.grad is not None
    assert 0 < float(output.loss.detach()) < math.inf
    assert states.grad.isfinite().all() and states.grad.any()
    assert table.grad.to_dense().isfinite().all()
