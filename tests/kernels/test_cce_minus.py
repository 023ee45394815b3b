"""cce_minus against its dense float64 definition with the same draws, and its estimate."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.loss_cases import SIZES, batch, check, ids
from torch import Tensor

from shardrec.kernels import sampled_cross_entropy
from shardrec.kernels.cce_minus import Sampler
from shardrec.kernels.negatives import Popularity, Proposal, Uniform
from shardrec.kernels.reference import sampled_cross_entropy_reference


def negatives_of_every_position(
    size: tuple[int, int, int], num_negatives: int, share: int, proposal: Proposal
) -> tuple[Tensor, Tensor]:
    sampler = Sampler(
        proposal=proposal,
        num_negatives=num_negatives,
        num_positions=size[0],
        share=share,
        seed=3,
        step=2,
    )
    draws = sampler.draw(torch.arange(size[0]) % sampler.num_blocks)
    return draws, proposal.probability(draws)


@pytest.mark.parametrize("share", [1, 8, 1000])
@pytest.mark.parametrize("num_negatives", [1, 5, 64])
@pytest.mark.parametrize("size", SIZES[:-1], ids=ids)
def test_cce_minus_equals_its_definition_with_the_same_draws(
    size: tuple[int, int, int], num_negatives: int, share: int
) -> None:
    proposal = Popularity(torch.arange(size[1]) % 7, 0.5)
    draws, probability = negatives_of_every_position(size, num_negatives, share, proposal)
    corrections = (num_negatives * probability).log()

    def ours(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return sampled_cross_entropy(
            states,
            table,
            targets,
            num_negatives=num_negatives,
            share=share,
            seed=3,
            step=2,
            proposal=proposal,
            reduction="none",
            sparse_grad=share == 8,
        )

    def reference(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return sampled_cross_entropy_reference(
            states, table, targets, draws, corrections.to(states.dtype)
        )

    check(ours, reference, batch(size), torch.float32)


def test_cce_minus_parity_form_counts_the_kept_draws() -> None:
    size = (37, 11, 12)
    draws, _ = negatives_of_every_position(size, 9, 4, Uniform(11))
    targets = batch(size)[2]
    kept = (draws != targets[:, None]).sum(1, keepdim=True)
    assert (kept < 9).any()
    corrections = (kept / (11 - 1)).log().expand_as(draws)

    def ours(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return sampled_cross_entropy(
            states,
            table,
            targets,
            num_negatives=9,
            share=4,
            seed=3,
            step=2,
            parity=True,
            reduction="none",
        )

    def reference(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return sampled_cross_entropy_reference(
            states, table, targets, draws, corrections.to(states.dtype)
        )

    check(ours, reference, batch(size), torch.float32)


def test_cce_minus_is_unbiased_for_the_sum_of_exponentials() -> None:
    states, table, targets = batch((1, 50, 4), scale=0.3)
    others = (states @ table.T).exp()[0]
    truth = others.sum() - others[targets[0]]
    estimates = []
    for step in range(300):
        loss = sampled_cross_entropy(
            states, table, targets, num_negatives=20, seed=1, step=step, reduction="none"
        )
        estimates.append(float(loss.exp() - 1) * float(others[targets[0]]))
    assert sum(estimates) / len(estimates) == pytest.approx(float(truth), rel=0.03)


def test_a_position_whose_draws_all_collide_has_no_loss() -> None:
    states, table, targets = batch((5, 1, 4))
    loss = sampled_cross_entropy(states, table, targets, num_negatives=6, seed=0, reduction="none")
    assert torch.equal(loss, torch.zeros(5))
