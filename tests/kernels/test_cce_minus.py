"""cce_minus against its dense float64 definition with the same draws, and its estimate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kernels.loss_cases import SIZES, batch, check, ids
from torch import Tensor

from shardrec.kernels import cce_minus, sampled_cross_entropy
from shardrec.kernels.loss import operator as operation
from shardrec.kernels.loss.fused import fused_blocks
from shardrec.kernels.negatives import Popularity, Proposal, Uniform
from shardrec.kernels.negatives.sampler import Sampler
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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("share", [1, 8, None])
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_cce_minus_with_its_gradient_taken_in_forward_equals_its_definition(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], share: int | None, reduction: str
) -> None:
    proposal = Popularity(torch.arange(size[1]) % 7 + 1, 0.5)
    draws, probability = negatives_of_every_position(size, 33, share or size[0], proposal)
    weights = torch.rand(size[0], generator=torch.Generator().manual_seed(0))
    sparse_grad = share == 8
    states, table, targets = (part.requires_grad_(part.is_floating_point()) for part in batch(size))

    def run() -> list[Tensor]:
        loss = sampled_cross_entropy(
            states,
            table,
            targets,
            num_negatives=33,
            share=share,
            seed=3,
            step=2,
            proposal=proposal,
            sparse_grad=sparse_grad,
            weights=weights,
            reduction=reduction,
            temperature=0.7,
        )
        grad_states, grad_rows = torch.autograd.grad(3 * loss, (states, table))
        assert grad_rows.is_sparse == sparse_grad
        return [loss.detach(), grad_states, grad_rows.to_dense()]

    fused: list[Tensor] = []

    def spy(*args: Any) -> tuple[Tensor, ...]:
        fused.append(args[0].targets)
        return fused_blocks(*args)

    monkeypatch.setattr(operation, "fused_blocks", spy)
    once = run()
    assert fused
    assert all(torch.equal(*pair) for pair in zip(run(), once, strict=True))
    monkeypatch.setattr(cce_minus, "_is_final_in_a_block", lambda *_: False)
    fused.clear()
    streamed = run()
    assert not fused
    exact, rows = (
        states.detach().double().requires_grad_(),
        table.detach().double().requires_grad_(),
    )
    losses = sampled_cross_entropy_reference(
        exact / 0.7, rows, targets, draws, (33 * probability).log()
    )
    truth = (losses * weights).sum()
    truth = truth / weights.double().sum() if reduction == "mean" else truth
    expected = [truth.detach(), *torch.autograd.grad(3 * truth, (exact, rows))]
    for found, twice, right in zip(once, streamed, expected, strict=True):
        torch.testing.assert_close(found, twice, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, right.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_saturated_logits_of_cce_minus_stay_exact(scale: float, reduction: str) -> None:
    size = (37, 101, 12)
    draws, probability = negatives_of_every_position(size, 20, 8, Uniform(101))
    corrections = (20 * probability).log()

    def ours(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return sampled_cross_entropy(
            states,
            table,
            targets,
            num_negatives=20,
            share=8,
            seed=3,
            step=2,
            reduction=reduction,
        )

    def reference(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        losses = sampled_cross_entropy_reference(
            states, table, targets, draws, corrections.to(states.dtype)
        )
        return losses if reduction == "none" else losses.mean()

    check(ours, reference, batch(size, scale), torch.float32)


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
