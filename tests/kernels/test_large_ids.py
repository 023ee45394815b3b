"""Items above 2**24, where float32 no longer tells neighbours apart: their gradients are exact.

All rows but the last are zero, so that the float64 truth needs one row of zeros in their place.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.every_loss import assert_equals_truth, gradients
from tests.loss_choices import places_by_bucket
from torch import Tensor

from shardrec.kernels import (
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.negatives import (
    STREAM_HASH,
    STREAM_MIX,
    STREAM_NEGATIVES,
    Popularity,
    random_signs,
)
from shardrec.kernels.reference import (
    sampled_cross_entropy_reference,
    scalable_cross_entropy_reference,
)

NUM_ITEMS, NUM_LAST, NUM_POSITIONS, WIDTH = (1 << 24) + 20, 16, 6, 2
FIRST = NUM_ITEMS - NUM_LAST  # the first row that is not zero, above 2**24 too
TARGETS = FIRST + torch.tensor([1, 2, 7, 8, 14, 15])
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


def last_rows() -> tuple[Tensor, Tensor]:
    """(N, D) states and (16, D) rows, which come with their negatives: a centre likes half."""
    generator = torch.Generator().manual_seed(0)
    states = 3 * torch.randn(NUM_POSITIONS, WIDTH, generator=generator)
    half = 3 * torch.randn(NUM_LAST // 2, WIDTH, generator=generator)
    return states, torch.cat([half, -half])


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table() -> Tensor:
    rows = torch.zeros(NUM_ITEMS, WIDTH)
    rows[FIRST:] = last_rows()[1]
    return rows


def assert_last_rows_are_exact(ours: Losses, table: Tensor, definition: Losses) -> None:
    """Value, gradient of the states and of the last rows; definition takes the last rows."""
    states, last = last_rows()
    leaf, whole = states.clone().requires_grad_(), table.detach().requires_grad_()
    loss, grad_states, grad_rows = gradients(ours(leaf, whole, TARGETS), leaf, whole)
    exact, rows = (one.double().requires_grad_() for one in (states, last))
    expected = gradients(definition(exact, rows, TARGETS - FIRST), exact, rows)
    assert all(expected[2][TARGETS - FIRST].any(1)), "every target has a gradient of its own"
    assert_equals_truth([loss, grad_states, grad_rows[FIRST:]], expected)


def with_zeros(rows: Tensor) -> Tensor:
    """(17, D) the last rows and one that stands for all others."""
    return torch.cat([rows, rows.new_zeros(1, WIDTH)])


def compared_with(counts: Tensor) -> Losses:
    """Mean cross-entropy with (N, 17) numbers of rows of each kind as candidates."""

    def definition(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        kinds = torch.arange(NUM_LAST + 1).expand(len(states), -1)
        corrections = -counts.double().log()
        losses = sampled_cross_entropy_reference(
            states, with_zeros(rows), targets, kinds, corrections
        )
        return losses.mean()

    return definition


def test_cce_tells_neighbours_above_2_to_24_apart(table: Tensor) -> None:
    counts = torch.ones(NUM_POSITIONS, NUM_LAST + 1)
    counts[:, -1] = FIRST
    assert_last_rows_are_exact(cut_cross_entropy, table, compared_with(counts))


@pytest.fixture(scope="module")
def proposal() -> Popularity:
    """Draws the k-th of the last rows with probability proportional to k."""
    counts = torch.zeros(NUM_ITEMS, dtype=torch.int64)
    counts[FIRST:] = torch.arange(1, NUM_LAST + 1) << 40
    return Popularity(counts)


@pytest.mark.parametrize(
    ("reduction", "sparse_grad"), [("mean", True), ("mean", False), ("none", True)]
)
def test_cce_minus_tells_neighbours_above_2_to_24_apart(
    table: Tensor, proposal: Popularity, reduction: str, sparse_grad: bool
) -> None:
    draws = proposal.draw(torch.arange(2), 40, seed=1, step=0, stream=STREAM_NEGATIVES)
    draws = draws[torch.arange(NUM_POSITIONS) % 2]
    assert draws.min() >= FIRST and len(draws.unique()) > 12
    shares = (torch.arange(NUM_LAST) + 1) / 136  # 1 + 2 + ... + 16

    def ours(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        return sampled_cross_entropy(
            states,
            rows,
            targets,
            num_negatives=40,
            share=3,
            seed=1,
            proposal=proposal,
            sparse_grad=sparse_grad,
            reduction=reduction,
        )

    def definition(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        drawn = draws - FIRST
        corrections = (40 * shares.double()[drawn]).log()
        losses = sampled_cross_entropy_reference(states, rows, targets, drawn, corrections)
        return losses.mean() if reduction == "mean" else losses

    assert_last_rows_are_exact(ours, table, definition)


def test_sce_tells_neighbours_above_2_to_24_apart(table: Tensor) -> None:
    def ours(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        loss = scalable_cross_entropy(
            states,
            rows,
            targets,
            num_buckets=3,
            positions_per_bucket=NUM_POSITIONS,
            items_per_bucket=5,
            seed=0,
            sparse_grad=True,
        )
        assert isinstance(loss, Tensor)
        return loss

    def definition(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        signs = random_signs(0, NUM_POSITIONS, 3, seed=0, step=0, stream=STREAM_MIX)
        centres = signs.double().T @ states.detach()
        items = (centres @ rows.detach().T).topk(5).indices
        everyone = torch.arange(NUM_POSITIONS).expand(3, -1)
        return scalable_cross_entropy_reference(states, rows, targets, everyone, items).mean()

    assert_last_rows_are_exact(ours, table, definition)


def test_rece_tells_neighbours_above_2_to_24_apart(table: Tensor) -> None:
    signs = random_signs(0, 6, WIDTH, seed=0, step=0, stream=STREAM_HASH).double()
    own, last = ((part.double() @ signs.T).argmax(1).tolist() for part in last_rows())
    # Rows of zeros are in the first bucket, before the last rows.
    sizes = [last.count(bucket) + FIRST * (bucket == 0) for bucket in range(6)]
    order = sorted(range(NUM_LAST), key=lambda row: (last[row], row))
    places = {row: FIRST + place for place, row in enumerate(order)}
    row_chunks = [places[row] * 3 // NUM_ITEMS for row in range(NUM_LAST)]
    # The first place of each of three chunks.
    starts = [-(-chunk * NUM_ITEMS // 3) for chunk in range(3)]
    zeros = [end - start for start, end in zip(starts, [*starts[1:], FIRST], strict=True)]
    counts = torch.zeros(NUM_POSITIONS, NUM_LAST + 1)
    for position, place in enumerate(places_by_bucket(own, sizes)):
        near = [abs(chunk - place * 3 // NUM_ITEMS) <= 1 for chunk in range(3)]
        counts[position, :-1] = torch.tensor([near[chunk] for chunk in row_chunks]).float()
        counts[position, -1] = sum(zeros[chunk] for chunk in range(3) if near[chunk])
    assert counts[:, :-1].any() and (counts[:, -1] < FIRST).any()

    def ours(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        return reduced_cross_entropy(
            states, rows, targets, num_buckets=6, num_chunks=3, num_rounds=1, seed=0
        )

    assert_last_rows_are_exact(ours, table, compared_with(counts))
