"""Invariants A and B together: encoder, catalog and loss on 1, 2, 3 ranks and in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.ranks import Ranks
from torch import Tensor, nn

from shardrec.kernels.problem import Scaling, pose
from shardrec.kernels.rece import gather_histogram, hash_buckets, item_chunks, position_chunks
from shardrec.kernels.sce import fill_buckets, mixed_centres
from shardrec.modules.catalog import Catalog, CatalogConfig
from shardrec.modules.losses import LOSSES, Step
from shardrec.modules.shard import RowShard

NUM_ITEMS, WIDTH, NUM_POSITIONS, NUM_STEPS = 83, 8, 41, 3
POSITION_ENDS = {1: (41,), 2: (30, 41), 3: (17, 17, 41)}
OPTIONS = {
    "cce": {},
    "cce_minus": {"num_negatives": 12, "share": 8},
    "sce": {"num_buckets": 5, "positions_per_bucket": 9, "items_per_bucket": 12},
    "rece": {"num_buckets": 8, "num_rounds": 2},
}
OPTIMIZERS = ["sgd", "adagrad", "rowwise_adagrad", "adam", "sparse_adam"]
CASES = [(loss, "rowwise_adagrad") for loss in OPTIONS] + [
    (loss, optimizer)
    for loss in ("cce", "cce_minus")
    for optimizer in OPTIMIZERS
    if optimizer != "rowwise_adagrad"
]


@dataclass
class Outcome:
    losses: list[float]
    encoder_gradient: Tensor
    rows: Tensor


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Items looked up and targets; few items, so that a row is looked up often and is a target."""
    generator = torch.Generator().manual_seed(step)
    items = torch.randint(0, 20, (NUM_POSITIONS,), generator=generator)
    return items, torch.randint(0, 25, (NUM_POSITIONS,), generator=generator)


def encoder() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)))
        layer.bias.zero_()
    return layer


def train(loss_name: str, optimizer: str) -> Outcome:
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    config = CatalogConfig(optimizer=optimizer, learning_rate=0.1, init_std=1.0)
    catalog = Catalog(
        NUM_ITEMS,
        WIDTH,
        config,
        group=dist.group.WORLD,
        device=torch.device("cpu"),
        seed=4,
    )
    layer, loss = encoder(), LOSSES[loss_name](**OPTIONS[loss_name])
    ends = POSITION_ENDS[num_ranks]
    own = slice(ends[rank - 1] if rank else 0, ends[rank])
    losses = []
    for step in range(NUM_STEPS):
        items, targets = batch(step)
        states = torch.tanh(layer(catalog.lookup(items[own])))
        output = loss(
            states, catalog.shard, targets[own], weights=None, step=Step(seed=2, step=step)
        )
        output.loss.backward()
        catalog.step()
        losses.append(float(output.loss))
    assert layer.weight.grad is not None
    gradient = layer.weight.grad
    dist.all_reduce(gradient)
    return Outcome(losses, gradient, catalog.shard.rows.detach().clone())


@pytest.mark.parametrize(("loss", "optimizer"), CASES)
def test_ranks_change_neither_loss_nor_encoder_nor_table(
    ranks: Ranks, loss: str, optimizer: str
) -> None:
    alone = ranks(1).run(train, loss, optimizer)[0]
    for num_ranks in (2, 3):
        outcomes = ranks(num_ranks).run(train, loss, optimizer)
        for outcome in outcomes:
            assert outcome.losses == pytest.approx(alone.losses, rel=1e-5)
            torch.testing.assert_close(
                outcome.encoder_gradient, alone.encoder_gradient, rtol=1e-4, atol=1e-6
            )
        rows = torch.cat([outcome.rows for outcome in outcomes])
        torch.testing.assert_close(rows, alone.rows, rtol=1e-4, atol=2e-5)


def initial_rows() -> Tensor:
    config = CatalogConfig(init_std=1.0)
    device = torch.device("cpu")
    catalog = Catalog(NUM_ITEMS, WIDTH, config, group=dist.group.WORLD, device=device, seed=4)
    return catalog.shard.rows.detach().clone()


class RowWiseAdagrad(torch.optim.Optimizer):
    """One accumulator per row: the mean of the squared gradient over the width."""

    def __init__(self, table: Tensor, lr: float, eps: float) -> None:
        super().__init__([table], {})
        self.table, self.lr, self.eps = table, lr, eps
        self.sums = torch.zeros(table.shape[0])

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        gradient = self.table.grad
        assert gradient is not None
        self.sums += gradient.square().mean(1)
        with torch.no_grad():
            self.table -= self.lr * gradient / (self.sums.sqrt() + self.eps)[:, None]


def plain_optimizer(name: str, table: Tensor) -> torch.optim.Optimizer:
    if name == "rowwise_adagrad":
        return RowWiseAdagrad(table, lr=0.1, eps=1e-8)
    if name == "adagrad":
        return torch.optim.Adagrad([table], lr=0.1, eps=1e-8)
    if name == "sgd":
        return torch.optim.SGD([table], lr=0.1)
    return torch.optim.Adam([table], lr=0.1, eps=1e-8)


def plain_training(optimizer_name: str, rows: Tensor) -> Outcome:
    """Tied table, full softmax, nothing of ours."""
    table, layer, losses = rows.clone().requires_grad_(), encoder(), []
    optimizer = plain_optimizer(optimizer_name, table)
    for step in range(NUM_STEPS):
        items, targets = batch(step)
        loss = F.cross_entropy(torch.tanh(layer(table[items])) @ table.T, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert layer.weight.grad is not None
    return Outcome(losses, layer.weight.grad, table.detach())


@pytest.mark.parametrize("optimizer", OPTIMIZERS[:-1])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_training_equals_plain_torch(ranks: Ranks, optimizer: str, num_ranks: int) -> None:
    rows = ranks(1).run(initial_rows)[0]
    expected = plain_training(optimizer, rows)
    outcomes = ranks(num_ranks).run(train, "cce", optimizer)
    assert outcomes[0].losses == pytest.approx(expected.losses, rel=1e-5)
    torch.testing.assert_close(
        outcomes[0].encoder_gradient, expected.encoder_gradient, rtol=1e-4, atol=1e-6
    )
    updated = torch.cat([outcome.rows for outcome in outcomes])
    torch.testing.assert_close(updated, expected.rows, rtol=1e-4, atol=5e-5)


def test_sparse_adam_with_a_sampled_loss_leaves_untouched_rows_alone(ranks: Ranks) -> None:
    before = ranks(1).run(initial_rows)[0]
    outcomes = ranks(2).run(train, "cce_minus", "sparse_adam")
    after = torch.cat([outcome.rows for outcome in outcomes])
    unchanged = (after == before).all(1)
    assert 0 < int(unchanged.sum()) < NUM_ITEMS - 25


def choices() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What sce and rece choose: bucket positions and items, chunks of positions and of rows."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    states, table = (torch.randn(n, WIDTH, generator=generator) for n in (NUM_POSITIONS, NUM_ITEMS))
    ends = POSITION_ENDS[num_ranks]
    own = slice(ends[rank - 1] if rank else 0, ends[rank])
    block = -(-NUM_ITEMS // num_ranks)
    shard = RowShard(
        table[rank * block : (rank + 1) * block], rank * block, NUM_ITEMS, dist.group.WORLD
    )
    problem = pose(
        states[own],
        shard,
        torch.zeros(own.stop - own.start, dtype=torch.int64),
        weights=None,
        reduction="mean",
        scaling=Scaling(normalize=False, temperature=1.0),
    )
    exchange = problem.exchange
    centres = exchange.sum(
        mixed_centres(problem.states, exchange.first_position, 7, seed=1, step=1)
    )
    buckets = fill_buckets(problem, centres, 9, 12)
    hashed = [hash_buckets(part, 16, 3, seed=1, step=1) for part in (states[own], shard.rows)]
    own_counts, row_counts = (gather_histogram(part, 16, exchange) for part in hashed)
    chunks = position_chunks(hashed[0], own_counts, row_counts, 10, "bucket")
    return buckets.positions, buckets.items, chunks, item_chunks(hashed[1], row_counts, 10)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_sce_and_rece_choose_the_same_on_any_number_of_ranks(ranks: Ranks, num_ranks: int) -> None:
    positions, items, chunks, row_chunks = ranks(1).run(choices)[0]
    results = ranks(num_ranks).run(choices)
    for result in results:
        assert torch.equal(result[0], positions) and torch.equal(result[1], items)
    assert torch.equal(torch.cat([result[2] for result in results]), chunks)
    assert torch.equal(torch.cat([result[3] for result in results]), row_chunks)
