"""Training with attributes on 1, 2 and 3 ranks, against plain float64 autograd on one process."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from tests.every_loss import config_of
from tests.modules.small_attributes import SmallAttributes
from tests.pipeline.test_invariants import (
    CPU,
    EPS,
    LENGTH,
    NUM_ITEMS,
    OPTIMIZER,
    SEED,
    STEPS,
    TABLE_RATE,
    WIDTH,
    global_batch,
    make_encoder,
    own_part,
    table_optimizer,
)
from tests.ranks import Ranks
from torch import Tensor
from torch.nn import functional as F

from shardrec.kernels.shard import RowShard
from shardrec.modules.attributes import AttributeVectors
from shardrec.modules.catalog import Catalog
from shardrec.modules.catalog_config import CatalogConfig
from shardrec.modules.loss import Batch as LossBatch
from shardrec.modules.losses import Step
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.run.step import Stepper

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

SOURCE = SmallAttributes(NUM_ITEMS)


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    attributes: dict[str, Tensor]
    ids: Tensor
    rows: Tensor


def make_catalog(attributes: str, optimizer: str, group: dist.ProcessGroup | None) -> Catalog:
    config = CatalogConfig(
        optimizer=optimizer,
        learning_rate=TABLE_RATE,
        eps=EPS,
        betas=(0.9, 0.98),
        init_std=0.5,
        attributes=attributes,
        id_dropout=0.3 if attributes == "add" else 0.0,
    )
    return Catalog(NUM_ITEMS, WIDTH, config, group=group, device=CPU, seed=SEED, attributes=SOURCE)


def train_on_ranks(attributes: str, loss: str, optimizer: str) -> Outcome:
    catalog = make_catalog(attributes, optimizer, dist.group.WORLD)
    stepper = Stepper(
        Model(make_encoder(), catalog), config_of(loss), OPTIMIZER, seed=SEED, total_steps=None
    )
    # Sampled losses compose the rows that they read: others would make them NaN.
    catalog.shard.rows.detach().fill_(torch.nan)
    outcomes = [
        stepper.take([own_part(global_batch(2 * step + index)) for index in range(2)], step + 1)
        for step in range(STEPS)
    ]
    return Outcome(
        [outcome.loss for outcome in outcomes],
        [outcome.gradient_norm for outcome in outcomes],
        {name: one.detach().clone() for name, one in catalog.attributes.named_parameters()},
        catalog.state_dict()["rows"].clone(),
        catalog.shard.rows.detach().clone(),
    )


def named_rows(loss: str, num_items: int) -> int:
    """How many rows of a table a loss names."""
    rows = torch.zeros(num_items, WIDTH)
    batch = LossBatch(
        torch.zeros(4, WIDTH),
        RowShard(rows, 0, num_items),
        torch.tensor([1, 2, 3, 1]),
        None,
        Step(seed=SEED, step=0),
    )
    used = config_of(loss).used_rows(batch)
    return num_items if used is None else len(used)


def test_a_sampled_loss_names_fewer_rows_than_all() -> None:
    assert named_rows("cce", 5000) == 5000
    assert 3 <= named_rows("cce_minus", 5000) < 2500


def kept_ids(step: int) -> Tensor:
    """(V,) the ids that a step keeps, seen from outside: those of far ids."""
    catalog = make_catalog("add", "sgd", None)
    before = catalog.state_dict()["rows"]
    before.fill_(1000.0)
    catalog.begin_step(SEED, step)
    return (catalog.shard.rows.detach()[:, 0] > 500).double()


def loss_alone(
    loss: str, states: Tensor, rows: Tensor, targets: Tensor, draw: int
) -> tuple[Tensor, Tensor]:
    """The loss, and a leaf for the gradient of the rows.

    The full softmax in float64, others by their function on plain float32 tensors.
    """
    if loss == "cce":
        leaf = rows.detach().requires_grad_()
        return F.cross_entropy(states @ leaf.T, targets), leaf
    leaf = rows.detach().float().requires_grad_()
    step = Step(seed=SEED, step=draw)
    return config_of(loss)(states.float(), leaf, targets, step=step).loss.double(), leaf


def train_alone(attributes: str, loss: str, optimizer: str) -> Outcome:
    catalog = make_catalog(attributes, "sgd", None)
    ids = catalog.state_dict()["rows"].double().clone().requires_grad_()
    vectors = copy.deepcopy(catalog.attributes).double()
    assert isinstance(vectors, AttributeVectors)
    encoder = make_encoder().double().train()
    replicated = [*encoder.parameters(), *vectors.parameters()]
    adam = torch.optim.AdamW(
        replicated, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, eps=1.0, weight_decay=0.0
    )
    of_table = table_optimizer(optimizer, ids) if attributes == "add" else None
    losses, norms = [], []
    for step in range(STEPS):
        kept = kept_ids(step + 1)
        rows = SOURCE.compose(vectors, ids if attributes == "add" else None, kept)
        total = torch.zeros((), dtype=torch.float64)
        for draw in (2 * step, 2 * step + 1):
            batch = global_batch(draw)
            real = torch.arange(LENGTH) < batch.lengths[:, None]
            padded = torch.zeros(*batch.items.shape, WIDTH, dtype=torch.float64)
            padded[real] = rows[batch.items[real]]
            states = encoder(padded)[real]
            value, leaf = loss_alone(loss, states, rows, batch.targets[real], draw)
            value = value / 2
            value.backward(retain_graph=True)
            assert leaf.grad is not None
            rows.backward(leaf.grad.to_dense().double(), retain_graph=True)
            total += value.detach()
        losses.append(float(total))
        trained = replicated if of_table is None else [*replicated, ids]
        gradients = [one.grad for one in trained if one.grad is not None]
        norm = float(torch.cat([one.flatten() for one in gradients]).norm())
        norms.append(norm)
        assert OPTIMIZER.clip_norm is not None and norm > OPTIMIZER.clip_norm
        for one in gradients:
            one.mul_(OPTIMIZER.clip_norm / (norm + 1e-6))
        adam.step()
        if of_table is not None:
            of_table.step()
        for one in trained:
            one.grad = None
    weights = {name: value.detach() for name, value in vectors.named_parameters()}
    rows = SOURCE.compose(
        vectors, ids if attributes == "add" else None, SOURCE.trained(range(NUM_ITEMS)).double()
    )
    return Outcome(losses, norms, weights, ids.detach(), rows.detach())


@pytest.mark.parametrize("num_ranks", [1, 2, 3], ids=["W1", "W2", "W3"])
@pytest.mark.parametrize(
    ("attributes", "loss", "optimizer"),
    [
        ("add", "cce", "rowwise_adagrad"),
        ("add", "cce", "adam"),
        ("add", "cce_minus", "rowwise_adagrad"),
        ("add", "cce_minus", "adam"),
        ("only", "cce", "adam"),
        ("only", "cce_minus", "rowwise_adagrad"),
    ],
)
def test_a_step_with_attributes_is_the_same_on_any_number_of_ranks(
    ranks: Ranks, num_ranks: int, attributes: str, loss: str, optimizer: str
) -> None:
    expected = train_alone(attributes, loss, optimizer)
    found = ranks(num_ranks).run(train_on_ranks, attributes, loss, optimizer)
    for one in found:
        assert one.losses == pytest.approx(expected.losses, rel=2e-5)
        assert one.norms == pytest.approx(expected.norms, rel=1e-4)
        for name, value in expected.attributes.items():
            torch.testing.assert_close(one.attributes[name].double(), value, rtol=1e-4, atol=1e-5)
            assert torch.equal(one.attributes[name], found[0].attributes[name])
    rows = torch.cat([one.rows for one in found]).double()
    torch.testing.assert_close(rows, expected.rows, rtol=1e-4, atol=2e-5)
    ids = torch.cat([one.ids for one in found]).double()
    if attributes == "add":
        torch.testing.assert_close(ids, expected.ids, rtol=1e-4, atol=2e-5)
        initial = make_catalog("add", "sgd", None).state_dict()["rows"].double()
        moved = (ids != initial).any(1)
        assert not moved[~SOURCE.trained(range(NUM_ITEMS))].any() and moved.any()
    else:
        assert ids.shape == (NUM_ITEMS, 0)
