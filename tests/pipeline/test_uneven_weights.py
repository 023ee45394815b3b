"""The weighted mean of a step, where ranks have very uneven weights, none, or no positions."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.pipeline.test_invariants import LENGTH, NUM_ITEMS, SEED, make_catalog, make_encoder
from tests.ranks import Ranks
from torch import Tensor
from torch.nn import functional as F

from shardrec.modules.losses import CCE
from shardrec.pipeline.model.model import Model
from shardrec.pipeline.prepared.loader import Batch
from shardrec.pipeline.run.config import OptimizerConfig
from shardrec.pipeline.run.layout import Layout
from shardrec.pipeline.run.mesh import open_layout
from shardrec.pipeline.run.step import Stepper

# Weights of the sequences of three batches, dealt to the ranks of a replica one by one.
WEIGHTS = ([1e5, 1e-5, 0.0, 3.0], [0.0, 0.0, 0.0], [2e-4])
OPTIMIZER = OptimizerConfig(learning_rate=0.5, eps=1.0, accumulate=len(WEIGHTS))
LAYOUTS = [(2, 1), (1, 2), (2, 2), (3, 1), (1, 3)]


def batch(index: int) -> Batch:
    generator = torch.Generator().manual_seed(index)
    weights = torch.tensor(WEIGHTS[index])[:, None].expand(-1, LENGTH)
    items = torch.randint(NUM_ITEMS, (len(weights), LENGTH + 1), generator=generator)
    lengths = torch.full((len(weights),), LENGTH)
    return Batch(items[:, :-1], lengths, items[:, 1:], weights)


def dealt(whole: Batch, shard: int, num_shards: int, *, is_own: bool) -> Batch:
    own = slice(shard, None, num_shards) if is_own else slice(0)
    assert whole.weights is not None
    return Batch(whole.items[own], whole.lengths[own], whole.targets[own], whole.weights[own])


def step(num_replicas: int, num_shards: int) -> tuple[float, float, Tensor]:
    """Loss, gradient norm, and rows of this rank after a step."""
    group, replicas = open_layout(Layout(num_replicas, num_shards), torch.device("cpu"))
    catalog = make_catalog("sgd", group)
    catalog.replicas = replicas
    stepper = Stepper(Model(make_encoder(), catalog), CCE(), OPTIMIZER, seed=SEED, total_steps=None)
    replica, shard = divmod(dist.get_rank(), num_shards)
    parts = [
        dealt(batch(index), shard, num_shards, is_own=index % num_replicas == replica)
        for index in range(len(WEIGHTS))
    ]
    outcome = stepper.take(parts, 1)
    return outcome.loss, outcome.gradient_norm, catalog.state_dict()["rows"].clone()


def written_out() -> float:
    """The weighted mean in float64, over plain tensors."""
    catalog = make_catalog("sgd", None)
    rows, encoder = catalog.state_dict()["rows"].double(), make_encoder().double()
    total = weight = 0.0
    for index in range(len(WEIGHTS)):
        one = batch(index)
        assert one.weights is not None
        logits = encoder(rows[one.items]) @ rows.T
        losses = F.cross_entropy(logits.flatten(0, 1), one.targets.flatten(), reduction="none")
        total += float((losses.view_as(one.weights) * one.weights).sum().detach())
        weight += float(one.weights.double().sum())
    return total / weight


@pytest.mark.slow
def test_a_weighted_mean_is_over_all_ranks_and_replicas(ranks: Ranks) -> None:
    ((loss, norm, rows),) = ranks(1).run(step, 1, 1)
    assert loss == pytest.approx(written_out(), rel=1e-5)
    for num_replicas, num_shards in LAYOUTS:
        found = ranks(num_replicas * num_shards).run(step, num_replicas, num_shards)
        for mine, its_norm, _ in found:
            assert (mine, its_norm) == pytest.approx((loss, norm), rel=2e-5)
        together = torch.cat([part for _, _, part in found[:num_shards]])
        torch.testing.assert_close(together, rows, rtol=1e-4, atol=2e-5)
