"""Replicas of the sharded table: the same step for any number of them, bit-equal copies."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.every_loss import config_of, names
from tests.modules.small_attributes import SmallAttributes
from tests.pipeline.test_invariants import LENGTH, LENGTHS, NUM_ITEMS, SEED, make_encoder
from tests.ranks import Ranks
from torch import Tensor

from shardrec.modules.catalog import Catalog
from shardrec.modules.catalog_config import OPTIMIZERS, CatalogConfig
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.prepared.loader import Batch
from shardrec.pipeline.run.config import OptimizerConfig
from shardrec.pipeline.run.layout import Layout
from shardrec.pipeline.run.mesh import open_layout
from shardrec.pipeline.run.step import Stepper

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# Two replicas and three divide it; the last step has fewer batches, as at the end of an epoch.
ACCUMULATE = 6
STEP_SIZES = (6, 4)
OPTIMIZER = OptimizerConfig(learning_rate=0.5, eps=1.0, clip_norm=0.05, accumulate=ACCUMULATE)
LAYOUTS = {"2x1": (2, 1), "1x2": (1, 2), "2x2": (2, 2), "3x1": (3, 1), "1x3": (1, 3)}
EMPTY = 3  # a batch without sequences
ATTRIBUTE_CASES = [
    ("cce", "adam", "add"),
    ("cce_minus", "rowwise_adagrad", "add"),
    ("cce", "adagrad", "only"),
]


def cases_of(layout: str) -> list[tuple[str, str, str]]:
    """Every loss and every optimizer on each layout, and over the layouts one with the other.

    Losses that choose stay with one optimizer: after other updates a choice could be a near tie.
    Attributes come on layouts of replicas alone, of shards alone, and of both.
    """
    shift = list(LAYOUTS).index(layout)
    turned = [
        (loss, OPTIMIZERS[(index + shift) % len(OPTIMIZERS)], "none")
        for index, loss in enumerate(names(chooses=False))
    ]
    choosing = [(loss, "rowwise_adagrad", "none") for loss in names(chooses=True)]
    return turned + choosing + (ATTRIBUTE_CASES if layout in ("2x2", "3x1", "1x3") else [])


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    positions: list[int]
    encoder: dict[str, Tensor]
    first_row: int
    rows: Tensor
    states: dict[str, Tensor]
    sums: list[str]


def micro_batch(index: int) -> Batch:
    """A global batch with weights; its numbers of sequences differ by index."""
    generator = torch.Generator().manual_seed(index)
    items = torch.randint(NUM_ITEMS, (len(LENGTHS), LENGTH + 1), generator=generator)
    lengths = LENGTHS.roll(index)[: 0 if index == EMPTY else 3 + index % 5]
    items = items[: len(lengths)]
    real = torch.arange(LENGTH) < lengths[:, None]
    weights = torch.rand(items[:, :-1].shape, generator=generator) * (1 + index) * real
    return Batch(items[:, :-1] * real, lengths, items[:, 1:] * real, weights)


def own_part(batch: Batch, shard: int, num_shards: int, *, is_own: bool) -> Batch:
    """The last rank of a group has most sequences, the first few or none."""
    number = len(batch.lengths) if is_own else 0
    ends = [number * (one * one) // num_shards**2 for one in (shard, shard + 1)]
    own = slice(*ends)
    assert batch.weights is not None
    return Batch(batch.items[own], batch.lengths[own], batch.targets[own], batch.weights[own])


def digest(tensors: dict[str, Tensor]) -> str:
    """Of all bits."""
    content = b"".join(one.contiguous().numpy().tobytes() for one in tensors.values())
    return hashlib.sha256(content).hexdigest()


def make_catalog(optimizer: str, attributes: str, group: Any, replicas: Any) -> Catalog:
    config = CatalogConfig(
        optimizer=optimizer,
        learning_rate=20.0 if optimizer == "sgd" else 0.05,
        eps=1e-6,
        init_std=0.5,
        betas=(0.9, 0.98),
        attributes=attributes,
        id_dropout=0.3 if attributes == "add" else 0.0,
    )
    width = make_encoder().config.width
    source = SmallAttributes(NUM_ITEMS)
    return Catalog(
        NUM_ITEMS,
        width,
        config,
        group=group,
        device=CPU,
        seed=SEED,
        attributes=source,
        replicas=replicas,
    )


def train(
    loss: str, optimizer: str, attributes: str, num_replicas: int, num_shards: int
) -> Outcome:
    group, replicas = open_layout(Layout(num_replicas, num_shards), CPU)
    replica, shard = divmod(dist.get_rank(), num_shards)
    catalog = make_catalog(optimizer, attributes, group, replicas)
    stepper = Stepper(
        Model(make_encoder(), catalog), config_of(loss), OPTIMIZER, seed=SEED, total_steps=None
    )
    outcomes, sums, first = [], [], 0
    for step, size in enumerate(STEP_SIZES):
        batches = [
            own_part(
                micro_batch(first + index),
                shard,
                num_shards,
                is_own=index % num_replicas == replica,
            )
            for index in range(size)
        ]
        outcomes.append(stepper.take(batches, step + 1))
        sums.append(digest({k: v for k, v in catalog.state_dict().items() if v.ndim}))
        first += size
    state = {name: one.clone() for name, one in catalog.state_dict().items()}
    return Outcome(
        [outcome.loss for outcome in outcomes],
        [outcome.gradient_norm for outcome in outcomes],
        [outcome.positions for outcome in outcomes],
        {
            name: one.detach().clone()
            for module in (stepper.model.encoder, catalog.attributes)
            for name, one in module.named_parameters()
        },
        catalog.row_range.start,
        state.pop("rows"),
        {name: one for name, one in state.items() if one.ndim},
        sums,
    )


def train_all(
    cases: list[tuple[str, str, str]], num_replicas: int, num_shards: int
) -> list[Outcome]:
    return [train(*case, num_replicas, num_shards) for case in cases]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_same_for_any_number_of_replicas_and_shards(
    ranks: Ranks, layout: str
) -> None:
    cases, (num_replicas, num_shards) = cases_of(layout), LAYOUTS[layout]
    (alone,) = ranks(1).run(train_all, cases, 1, 1, timeout=600)
    found = ranks(num_replicas * num_shards).run(
        train_all, cases, num_replicas, num_shards, timeout=600
    )
    for case, expected, *outcomes in zip(cases, alone, *found, strict=True):
        for one in outcomes:
            assert one.losses == pytest.approx(expected.losses, rel=2e-5), case
            assert one.norms == pytest.approx(expected.norms, rel=1e-4), case
            assert one.positions == expected.positions
            torch.testing.assert_close(one.encoder, expected.encoder, rtol=1e-4, atol=2e-5)
        for shard in range(num_shards):
            copies = outcomes[shard::num_shards]
            assert all(one.sums == copies[0].sums for one in copies), case
        rows = torch.cat([one.rows for one in outcomes[:num_shards]])
        torch.testing.assert_close(rows, expected.rows, rtol=1e-4, atol=2e-5, msg=str(case))
