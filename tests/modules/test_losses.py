"""Options of the losses: refused where no batch could be trained with them, and where not, used."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from shardrec.modules.losses import LOSSES, RECE, SCE, CCEMinus, Loss, Step

BAD: list[tuple[str, str, Any]] = [
    *[(name, "temperature", value) for name in LOSSES for value in (0, -1.0, math.nan, math.inf)],
    *[(name, "num_negatives", value) for name in ("cce_minus", "bce", "gbce") for value in (0, -3)],
    ("cce_minus", "share", -1),
    ("cce_minus", "proposal", "unigram"),
    *[("cce_minus", "popularity_exponent", value) for value in (math.nan, -0.5, math.inf, 11)],
    ("sce", "num_buckets", -1),
    ("sce", "positions_per_bucket", -1),
    ("sce", "items_per_bucket", 0),
    ("rece", "num_buckets", -1),
    ("rece", "num_chunks", -1),
    ("rece", "num_rounds", 0),
    ("rece", "num_neighbor_chunks", -1),
    ("rece", "align", "row"),
    *[("gbce", "calibration", value) for value in (-0.1, 1.1, math.nan)],
]


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_an_option_that_no_batch_could_be_trained_with_is_refused_by_name(
    name: str, option: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^loss\.{option} must be .*, got '?{value}'?; \w+"):
        LOSSES[name](**{option: value})


def test_every_option_has_a_rule() -> None:
    for loss in LOSSES.values():
        free = {one.name for one in dataclasses.fields(loss) if not one.metadata}
        assert all(isinstance(getattr(loss(), name), bool) for name in free), free
        assert {option for name, option, _ in BAD if LOSSES[name] is loss} == {
            one.name for one in dataclasses.fields(loss)
        } - free, "each rule is tried above"


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
