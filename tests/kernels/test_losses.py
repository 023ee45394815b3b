"""What all losses keep: their dense float64 definition, values and gradients."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.loss_cases import DTYPES, SIZES, Losses, batch, check, ids
from torch import Tensor

from shardrec.kernels import (
    cce,
    cut_cross_entropy,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.buckets import fill_buckets, mixed_centres
from shardrec.kernels.loss import fused as fused_file
from shardrec.kernels.loss.inputs import Scaling, prepare_inputs
from shardrec.kernels.reference import (
    cross_entropy_reference,
    scalable_cross_entropy_reference,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_cce_is_the_full_softmax(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    def ours(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return cut_cross_entropy(states, table, targets, reduction="none")

    check(ours, cross_entropy_reference, batch(size), dtype)


@pytest.mark.parametrize("size", SIZES[2:], ids=ids)
def test_sce_equals_its_definition_with_the_same_buckets(size: tuple[int, int, int]) -> None:
    states, table, targets = batch(size)
    problem = prepare_inputs(
        states, table, targets, weights=None, reduction="mean", scaling=Scaling(False, 1.0)
    )
    centres = mixed_centres(states, 0, 7, seed=3, step=2)
    buckets = fill_buckets(problem, centres, 9, 33)

    def ours(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        loss, covered = scalable_cross_entropy(
            states,
            table,
            targets,
            num_buckets=7,
            positions_per_bucket=9,
            items_per_bucket=33,
            seed=3,
            step=2,
            reduction="none",
        )
        assert covered.nonzero()[:, 0].tolist() == buckets.positions.unique().tolist()
        return loss

    def reference(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return scalable_cross_entropy_reference(
            states, table, targets, buckets.positions, buckets.items
        )

    check(ours, reference, (states, table, targets), torch.float32)


def everything(name: str) -> Losses:
    def losses(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        if name == "cce":
            return cut_cross_entropy(states, table, targets, reduction="none")
        if name == "sce":
            loss, _ = scalable_cross_entropy(
                states,
                table,
                targets,
                num_buckets=1,
                positions_per_bucket=len(states),
                items_per_bucket=len(table),
                seed=0,
                reduction="none",
            )
            return loss
        return reduced_cross_entropy(
            states,
            table,
            targets,
            num_buckets=5,
            num_chunks=1,
            num_rounds=int(name.removeprefix("rece")),
            seed=0,
            reduction="none",
        )

    return losses


@pytest.mark.parametrize("name", ["sce", "rece1", "rece3"])
def test_one_bucket_or_chunk_that_holds_everything_is_the_full_softmax(name: str) -> None:
    check(everything(name), cross_entropy_reference, batch((37, 101, 12)), torch.float32)


def gradients_of(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("size", [*SIZES, (300, 90000, 4)], ids=ids)
def test_the_gradient_taken_in_forward_equals_the_one_computed_again(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], scale: float
) -> None:
    states, table, targets = batch(size, scale)
    states.requires_grad_(), table.requires_grad_()
    weights = torch.rand(size[0], generator=torch.Generator().manual_seed(0))
    results, fused = [], ran(monkeypatch, cce._cut_cross_entropy, "_fused")
    for least_positions in (1, 1 << 30):
        monkeypatch.setattr(fused_file, "LEAST_FUSED", least_positions)
        loss = cut_cross_entropy(states, table, targets, weights=weights)
        assert bool(fused) == (least_positions == 1)
        fused.clear()
        results.append([loss.detach(), *gradients_of(3 * loss, states, table)])
    for once, streamed in zip(*results, strict=True):
        # A float32 sum over 90,000 rows is only so good.
        torch.testing.assert_close(once, streamed, rtol=1e-4, atol=2e-5 * scale)


def ran(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[str]:
    """Grows by one name at each call."""
    calls: list[str] = []
    original = getattr(owner, name)

    def spy(*args: object) -> object:
        calls.append(name)
        return original(*args)

    monkeypatch.setattr(owner, name, spy)
    return calls


@pytest.mark.parametrize("name", ["cut_cross_entropy", "sampled_cross_entropy"])
def test_a_second_backward_through_the_fused_pass_is_refused(name: str) -> None:
    states, table, targets = batch((5, 9, 4))
    states.requires_grad_()
    if name == "cut_cross_entropy":
        loss = cut_cross_entropy(states, table, targets)
    else:
        loss = sampled_cross_entropy(states, table, targets, num_negatives=3, seed=0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} must run once"):
        loss.backward()


@pytest.mark.parametrize("name", ["cce", "sce", "rece3"])
@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_saturated_logits_stay_exact(name: str, scale: float) -> None:
    check(everything(name), cross_entropy_reference, batch((37, 101, 12), scale), torch.float32)


def test_more_rounds_over_the_same_candidates_change_nothing() -> None:
    states, table, targets = batch((37, 101, 12))
    one, many = (everything(f"rece{r}")(states, table, targets) for r in (1, 5))
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["cce", "cce_minus", "sce", "rece"])
def test_no_position_gives_loss_zero_and_no_gradient(name: str) -> None:
    states = torch.zeros(0, 4, requires_grad=True)
    table = torch.randn(6, 4, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.int64)
    loss = {
        "cce": lambda: cut_cross_entropy(states, table, targets),
        "cce_minus": lambda: sampled_cross_entropy(states, table, targets, num_negatives=3, seed=0),
        "sce": lambda: scalable_cross_entropy(states, table, targets, seed=0),
        "rece": lambda: reduced_cross_entropy(states, table, targets, seed=0),
    }[name]()
    assert isinstance(loss, Tensor)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert table.grad is not None and not table.grad.any()
