"""Label smoothing equals a cross-entropy with smoothed targets, on dense float64 logits."""

import dataclasses

import pytest
import torch
from tests.every_loss import (
    SCALINGS,
    WEIGHTS,
    assert_equals_truth,
    batch,
    gradients,
    reduced,
    scaled,
)
from torch import Tensor
from torch.nn import functional as F

from shardrec.kernels import RowShard
from shardrec.kernels.ranks.traffic import Workload
from shardrec.modules.loss import Batch
from shardrec.modules.losses import CCE, CCEMinus, EagerCE, SmoothedLoss, Step

STEP, SHARE = Step(seed=5, step=9), 0.3


def found(loss: SmoothedLoss, weights: Tensor | None) -> list[Tensor]:
    states, table, targets = batch()
    states.requires_grad_(), table.requires_grad_()
    return gradients(loss(states, table, targets, weights=weights, step=STEP).loss, states, table)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", [CCE, EagerCE])
def test_an_exact_loss_is_the_cross_entropy_of_smoothed_targets(
    kind: type[CCE | EagerCE], scaling: str
) -> None:
    normalize, temperature = SCALINGS[scaling]
    loss = kind(label_smoothing=SHARE, normalize=normalize, temperature=temperature)
    states, table, targets = batch()
    states, table = states.double().requires_grad_(), table.double().requires_grad_()
    exact, rows = scaled(states, table, normalize, temperature)
    losses = F.cross_entropy(exact @ rows.T, targets, reduction="none", label_smoothing=SHARE)
    expected = gradients(reduced(losses, torch.ones(60), WEIGHTS, "mean"), states, table)
    assert_equals_truth(found(loss, WEIGHTS), expected)


def test_a_sampled_loss_takes_the_mean_logit_of_its_own_uniform_draws() -> None:
    loss = CCEMinus(num_negatives=50, share=8, label_smoothing=SHARE)
    plain = found(dataclasses.replace(loss, label_smoothing=0.0), None)
    states, table, targets = (one.double() for one in batch())
    inputs = Batch(states.float(), table.float(), targets.long(), None, STEP)
    drawn = loss.drawn_for_smoothing(inputs)
    assert len(drawn) == 50 > len(drawn.unique()), "some are drawn twice, and count twice"
    other = dataclasses.replace(inputs, step=Step(seed=5, step=10))
    assert not torch.equal(drawn, loss.drawn_for_smoothing(other))
    states, table = states.requires_grad_(), table.requires_grad_()
    logits = states @ table.T
    term = logits[torch.arange(60), targets.long()] - logits[:, drawn].mean(1)
    expected = gradients(SHARE * term.mean(), states, table)
    both = [one + more for one, more in zip(plain, expected, strict=True)]
    assert_equals_truth(found(loss, None), both)


def test_a_sampled_loss_has_a_sparse_gradient_of_the_rows_it_says_it_reads() -> None:
    loss = CCEMinus(num_negatives=40, share=0, label_smoothing=SHARE)
    states, _, targets = batch()
    shard = RowShard(torch.randn(900, 12).requires_grad_(), 0, 900, None)
    loss(states, shard, targets, step=STEP).loss.backward()
    gradient = shard.rows.grad
    assert gradient is not None and gradient.is_sparse
    said = loss.used_rows(Batch(states, shard, targets, None, STEP))
    assert torch.equal(gradient.coalesce().indices()[0], said)
    assert 80 < len(said) < 140, "some of 40 negatives, 40 draws for smoothing and 43 targets"


def test_the_cost_of_smoothing_is_a_gather_of_the_states_and_the_rows_drawn() -> None:
    work = Workload(num_positions=100, num_items=10_000, num_ranks=2, width=8)
    plain, smoothed = (
        CCEMinus(num_negatives=64, label_smoothing=share).cost(work) for share in (0.0, SHARE)
    )
    assert smoothed.touched_rows == plain.touched_rows + 64 and not smoothed.is_dense
    more = sum(smoothed.received.values()) - sum(plain.received.values())
    assert more == 2 * 4 * 100 / 2 * 8
