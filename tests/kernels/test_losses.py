"""Losses at any size and dtype are their dense float64 definitions, values and gradients."""

from __future__ import annotations

import pytest
import torch
from tests.every_loss import evaluate, loss_of, names
from tests.kernels.counted import product_flops
from tests.kernels.loss_cases import DTYPES, SIZES, Losses, batch, check, ids
from tests.losses import LOSSES
from torch import Tensor

from shardrec.kernels.loss import fused
from shardrec.kernels.reference import cross_entropy_reference

OPERATORS = names(is_operator=True)


def ours(name: str, **options: object) -> Losses:
    """The losses of the positions by a function."""

    def losses(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return loss_of(name, states, table, targets, reduction="none", **options)

    return losses


def definition(name: str, **options: object) -> Losses:
    """The losses of the positions by the definition."""

    def losses(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return LOSSES[name].definition(states, table, targets, **LOSSES[name].options | options)[0]

    return losses


# Products in half precision choose other candidates than those in float64.
ANY_SIZE = [
    (name, dtype)
    for name in OPERATORS
    for dtype in DTYPES
    if dtype is torch.float32 or not LOSSES[name].chooses
]


@pytest.mark.parametrize(("name", "dtype"), ANY_SIZE, ids=ids)
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_a_loss_is_its_definition_at_any_size(
    size: tuple[int, int, int], name: str, dtype: torch.dtype
) -> None:
    check(ours(name), definition(name), batch(size), dtype)


@pytest.mark.parametrize("align", ["bucket", "rank"])
@pytest.mark.parametrize("reach", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES[2:-1], ids=ids)
def test_rece_is_its_definition_with_any_reach_and_alignment(
    size: tuple[int, int, int], reach: int, align: str
) -> None:
    sizes = {"num_buckets": 12, "num_chunks": 10, "num_rounds": 4, "num_neighbor_chunks": reach}
    options = sizes | {"align": align}
    check(ours("rece", **options), definition("rece", **options), batch(size), torch.float32)


@pytest.mark.parametrize("name", names(has_covered=True))
@pytest.mark.parametrize("size", SIZES[2:], ids=ids)
def test_the_mask_of_covered_positions_is_that_of_the_definition_at_any_size(
    size: tuple[int, int, int], name: str
) -> None:
    inputs = batch(size)
    _, covered = evaluate(name, *inputs, reduction="none")
    _, expected = LOSSES[name].definition(*inputs, **LOSSES[name].options)
    assert covered is not None and torch.equal(covered, expected)


# One bucket or chunk that holds everything.
EVERYTHING = {
    "cce": ours("cce"),
    "sce": ours("sce", num_buckets=1, positions_per_bucket=37, items_per_bucket=101),
    **{
        f"rece{rounds}": ours("rece", num_buckets=5, num_chunks=1, num_rounds=rounds)
        for rounds in (1, 3, 5)
    },
}


@pytest.mark.parametrize("name", ["sce", "rece1", "rece3"])
def test_one_bucket_or_chunk_that_holds_everything_is_the_full_softmax(name: str) -> None:
    check(EVERYTHING[name], cross_entropy_reference, batch((37, 101, 12)), torch.float32)


@pytest.mark.parametrize("name", ["cce", "sce", "rece3"])
@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_saturated_logits_stay_exact(name: str, scale: float) -> None:
    check(EVERYTHING[name], cross_entropy_reference, batch((37, 101, 12), scale), torch.float32)


def test_more_rounds_over_the_same_candidates_change_nothing() -> None:
    inputs = batch((37, 101, 12))
    one, many = (EVERYTHING[name](*inputs) for name in ("rece1", "rece5"))
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("size", [*SIZES, (300, 90000, 4)], ids=ids)
def test_the_gradient_taken_in_forward_equals_the_one_computed_in_backward(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], scale: float
) -> None:
    states, table, targets = batch(size, scale)
    states.requires_grad_(), table.requires_grad_()
    weights = torch.rand(size[0], generator=torch.Generator().manual_seed(0))
    results: list[list[Tensor]] = []
    for least_positions in (1, 1 << 30):
        monkeypatch.setattr(fused, "LEAST_FUSED", least_positions)
        loss = loss_of("cce", states, table, targets, weights=weights)

        def backward(loss: Tensor = loss) -> None:
            gradients = torch.autograd.grad(3 * loss, (states, table))
            results.append([loss.detach(), *gradients])

        assert (product_flops(backward) == 0) == (least_positions == 1)
    for once, streamed in zip(*results, strict=True):
        # A float32 sum over 90,000 rows is only so good.
        torch.testing.assert_close(once, streamed, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize("name", names(in_forward=True))
def test_a_second_backward_is_refused_where_the_gradient_was_taken_in_forward(name: str) -> None:
    states, table, targets = batch((5, 9, 4))
    states.requires_grad_()
    loss = loss_of(name, states, table, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=f"{LOSSES[name].function.__name__} must run once"):
        loss.backward()


@pytest.mark.parametrize("name", OPERATORS)
def test_no_position_gives_loss_zero_and_no_gradient(name: str) -> None:
    states = torch.zeros(0, 4, requires_grad=True)
    table = torch.randn(6, 4, requires_grad=True)
    loss = loss_of(name, states, table, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert table.grad is not None and not table.grad.any()


@pytest.mark.parametrize("name", names(is_operator=False))
def test_a_baseline_refuses_a_batch_without_positions(name: str) -> None:
    with pytest.raises(ValueError, match="states must hold a position on some rank"):
        loss_of(name, torch.zeros(0, 4), torch.randn(6, 4), torch.zeros(0, dtype=torch.int64))
