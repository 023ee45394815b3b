"""Invariants A and B together: encoder, look-up, loss, clipping and update on 1, 2 and 3 ranks.

Everything is compared with a plain loop on one process: an ordinary tensor for the table, the
losses on plain tensors, optimizers of torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.every_loss import config_of
from tests.losses import LOSSES
from tests.pipeline.choices import Choice, assert_same_choices, recorded_choices
from tests.ranks import Ranks
from torch import Tensor
from torch.nn import functional as F

from shardrec.modules.catalog import Catalog
from shardrec.modules.catalog_config import OPTIMIZERS, CatalogConfig
from shardrec.modules.encoder import EncoderConfig, TransformerEncoder
from shardrec.modules.losses import CCE, Loss, Step
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.prepared.loader import Batch
from shardrec.pipeline.run.config import OptimizerConfig
from shardrec.pipeline.run.step import Stepper

# Runs of several processes: seconds each.
pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
NUM_ITEMS, WIDTH, LENGTH = 307, 8, 6
SEED = 76  # one with which every choice of sce and rece is certain
LENGTHS = torch.tensor([6, 1, 4, 6, 3, 2, 5])
# Ends of the ranks' sequences: uneven, and with three ranks one that has none.
ENDS = {1: (7,), 2: (5, 7), 3: (4, 4, 7)}
TABLE_RATE, EPS = 0.05, 1e-6
# SGD moves a row by rate times gradient, and clipped gradients are small.
SGD_RATE = 20.0
# A large eps makes Adam's update follow the size of the gradient, not only its sign.
OPTIMIZER = OptimizerConfig(learning_rate=0.5, eps=1.0, clip_norm=0.05, accumulate=2)
STEPS = 2

CASES = [(name, "rowwise_adagrad") for name in LOSSES] + [
    (name, optimizer)
    for name in ("cce", "cce_minus")
    for optimizer in OPTIMIZERS
    if optimizer != "rowwise_adagrad"
]


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    encoder: dict[str, Tensor]
    rows: Tensor
    choices: list[Choice] = field(default_factory=list)
    touched: list[Tensor] = field(default_factory=list)  # (V,) bool by step; of one process alone


def global_batch(index: int) -> Batch:
    generator = torch.Generator().manual_seed(index)
    items = torch.randint(NUM_ITEMS, (len(LENGTHS), LENGTH + 1), generator=generator)
    real = torch.arange(LENGTH) < LENGTHS[:, None]
    return Batch(items[:, :-1] * real, LENGTHS, items[:, 1:] * real)


def own_part(batch: Batch) -> Batch:
    rank, ends = dist.get_rank(), ENDS[dist.get_world_size()]
    own = slice(ends[rank - 1] if rank else 0, ends[rank])
    return Batch(batch.items[own], batch.lengths[own], batch.targets[own])


def make_encoder() -> TransformerEncoder:
    config = EncoderConfig(width=WIDTH, max_length=LENGTH, num_blocks=1, dropout=0.0)
    return TransformerEncoder(config, seed=SEED)


def make_catalog(optimizer: str, group: dist.ProcessGroup | None) -> Catalog:
    rate = SGD_RATE if optimizer == "sgd" else TABLE_RATE
    config = CatalogConfig(
        optimizer=optimizer, learning_rate=rate, eps=EPS, init_std=0.5, betas=(0.9, 0.98)
    )
    return Catalog(NUM_ITEMS, WIDTH, config, group=group, device=CPU, seed=SEED)


def train_on_ranks(loss: str, optimizer: str) -> Outcome:
    catalog = make_catalog(optimizer, dist.group.WORLD)
    model = Model(make_encoder(), catalog)
    stepper = Stepper(model, config_of(loss), OPTIMIZER, seed=SEED, total_steps=None)
    with recorded_choices() as choices:
        outcomes = [
            stepper.take([own_part(global_batch(2 * step + index)) for index in range(2)], step + 1)
            for step in range(STEPS)
        ]
    return Outcome(
        [outcome.loss for outcome in outcomes],
        [outcome.gradient_norm for outcome in outcomes],
        {name: value.detach().clone() for name, value in model.encoder.named_parameters()},
        catalog.shard.rows.detach().clone(),
        choices,
    )


class RowwiseAdagrad:
    """Written out: one accumulator a row, of the mean square of its gradient."""

    def __init__(self, table: Tensor) -> None:
        self.table, self.sum = table, torch.zeros(len(table))

    @torch.no_grad()
    def step(self) -> None:
        gradient = self.table.grad
        assert gradient is not None
        self.sum += gradient.square().mean(1)
        self.table -= TABLE_RATE * gradient / (self.sum.sqrt() + EPS)[:, None]


def table_optimizer(name: str, table: Tensor) -> Any:
    betas = (0.9, 0.98)
    if name == "rowwise_adagrad":
        return RowwiseAdagrad(table)
    if name == "sgd":
        return torch.optim.SGD([table], lr=SGD_RATE)
    if name == "adagrad":
        return torch.optim.Adagrad([table], lr=TABLE_RATE, eps=EPS)
    if name == "adam":
        return torch.optim.Adam([table], lr=TABLE_RATE, betas=betas, eps=EPS)
    return torch.optim.SparseAdam([table], lr=TABLE_RATE, betas=betas, eps=EPS)


def backward_alone(
    encoder: TransformerEncoder, table: Tensor, loss: Loss, batch: Batch, step: int
) -> float:
    """Adds the gradients of half the batch's mean loss; returns that half."""
    real = torch.arange(LENGTH) < batch.lengths[:, None]
    padded = torch.zeros(*batch.items.shape, WIDTH)
    padded[real] = F.embedding(batch.items[real], table, sparse=not isinstance(loss, CCE))
    states = encoder(padded)[real]
    draw = Step(seed=SEED, step=step)
    value = loss(states, table, batch.targets[real], weights=None, step=draw).loss / 2
    value.backward()
    return float(value.detach())


def clip_alone(encoder: TransformerEncoder, table: Tensor, optimizer: str) -> float:
    """Scales all gradients by their global norm; leaves the table's as its optimizer wants it."""
    gradient = table.grad
    assert gradient is not None
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    gradients = [one.grad for one in encoder.parameters() if one.grad is not None]
    norm = float(torch.cat([one.flatten() for one in [*gradients, dense]]).norm())
    assert OPTIMIZER.clip_norm is not None and norm > OPTIMIZER.clip_norm
    scale = OPTIMIZER.clip_norm / (norm + 1e-6)
    for one in gradients:
        one.mul_(scale)
    if optimizer != "sparse_adam":
        table.grad = dense * scale
    elif gradient.is_sparse:
        table.grad = gradient.coalesce() * scale
    else:
        table.grad = (gradient * scale).to_sparse(1)  # the full softmax leaves no row at zero
    return norm


@cache
def train_alone(loss: str, optimizer: str) -> Outcome:
    """What runs on any number of ranks are compared with."""
    table = make_catalog("sgd", None).shard.rows.detach().clone().requires_grad_()
    encoder = make_encoder().train()
    adam = torch.optim.AdamW(
        encoder.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
        weight_decay=0.0,
    )
    other = table_optimizer(optimizer, table)
    losses, norms = [], []
    touched = list[Tensor]()
    choices = list[Choice]()
    for step in range(STEPS):
        adam.zero_grad()
        table.grad = None
        with recorded_choices() as chosen:
            losses.append(
                sum(
                    backward_alone(encoder, table, config_of(loss), global_batch(draw), draw)
                    for draw in (2 * step, 2 * step + 1)
                )
            )
        choices += chosen
        norms.append(clip_alone(encoder, table, optimizer))
        assert table.grad is not None
        touched.append(table.grad.to_dense().any(1))
        adam.step()
        other.step()
    weights = {name: value.detach() for name, value in encoder.named_parameters()}
    return Outcome(losses, norms, weights, table.detach(), choices, touched)


@pytest.mark.parametrize("num_ranks", [1, 2, 3], ids=["W1", "W2", "W3"])
@pytest.mark.parametrize(("loss", "optimizer"), CASES)
def test_a_step_is_the_same_on_any_number_of_ranks(
    ranks: Ranks, num_ranks: int, loss: str, optimizer: str
) -> None:
    expected = train_alone(loss, optimizer)
    found = ranks(num_ranks).run(train_on_ranks, loss, optimizer)
    if LOSSES[loss].chooses:
        assert len(expected.choices) == 2 * STEPS
        assert_same_choices([one.choices for one in found], expected.choices)
    for one in found:
        assert one.losses == pytest.approx(expected.losses, rel=2e-5)
        assert one.norms == pytest.approx(expected.norms, rel=1e-4)
        torch.testing.assert_close(one.encoder, expected.encoder, rtol=1e-4, atol=1e-5)
    rows = torch.cat([one.rows for one in found])
    torch.testing.assert_close(rows, expected.rows, rtol=1e-4, atol=2e-5)
    if loss == "cce_minus":
        assert_only_touched_rows_move(rows, expected.touched)


def assert_only_touched_rows_move(rows: Tensor, touched: list[Tensor]) -> None:
    """Rows without gradient in any step are bit by bit as they were, and there are many."""
    never, once = ~(touched[0] | touched[1]), touched[0] & ~touched[1]
    assert min(never.sum(), once.sum()) > NUM_ITEMS / 10
    initial = make_catalog("sgd", None).shard.rows.detach()
    assert torch.equal((rows != initial).any(1), ~never)
