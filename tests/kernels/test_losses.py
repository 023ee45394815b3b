"""Each loss against its dense float64 definition: values and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.tolerance import assert_as_close_as_eager
from torch import Tensor

from shardrec.kernels import (
    cce,
    cut_cross_entropy,
    fused_cce,
    reduced_cross_entropy,
    sampled_cross_entropy,
    scalable_cross_entropy,
)
from shardrec.kernels.cce_minus import Sampler
from shardrec.kernels.exchange import Alone
from shardrec.kernels.hash_chunks import (
    gather_histogram,
    hash_buckets,
    item_chunks,
    position_chunks,
)
from shardrec.kernels.negatives import Popularity, Proposal, Uniform
from shardrec.kernels.problem import Scaling, pose
from shardrec.kernels.reference import (
    cross_entropy_reference,
    reduced_cross_entropy_reference,
    sampled_cross_entropy_reference,
    scalable_cross_entropy_reference,
)
from shardrec.kernels.sce import fill_buckets, mixed_centres

SIZES = [(1, 1, 4), (1, 7, 8), (13, 1, 4), (37, 101, 12), (300, 517, 20), (64, 5000, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


def ids(value: object) -> str | None:
    if isinstance(value, tuple):
        return "N{}-V{}-D{}".format(*value)
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def batch(size: tuple[int, int, int], scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    num_positions, num_items, width = size
    generator = torch.Generator().manual_seed(num_positions + num_items)
    states = torch.randn(num_positions, width, generator=generator) * scale
    table = torch.randn(num_items, width, generator=generator)
    targets = torch.randint(0, num_items, (num_positions,), generator=generator)
    return states, table, targets


def values_and_gradients(
    losses: Losses, states: Tensor, table: Tensor, targets: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    states = states.to(dtype).requires_grad_()
    table = table.to(dtype).requires_grad_()
    upstream = torch.linspace(0.5, 1.5, states.shape[0])
    loss = losses(states, table, targets)
    gradients = torch.autograd.grad((loss * upstream.to(loss.dtype)).sum(), (states, table))
    return [loss.detach(), *(g.to_dense() if g.is_sparse else g for g in gradients)]


def check(
    ours: Losses, reference: Losses, batch: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    # The truth starts from the rounded inputs, so that only the arithmetic is compared.
    rounded = (batch[0].to(dtype), batch[1].to(dtype), batch[2])
    truth = values_and_gradients(reference, *rounded, torch.float64)
    eager = values_and_gradients(reference, *rounded, dtype)
    result = values_and_gradients(ours, *rounded, dtype)
    # A log-sum-exp is stored as one float, so a probability is as exact as that float's last bit.
    logits = rounded[0].double() @ rounded[1].double().T
    slack = float(logits.detach().abs().max()) * torch.finfo(torch.float32).eps
    for mine, theirs, right in zip(result, eager, truth, strict=True):
        assert_as_close_as_eager(mine, theirs, right, slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("size", SIZES, ids=ids)
def test_cce_is_the_full_softmax(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    def ours(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return cut_cross_entropy(states, table, targets, reduction="none")

    check(ours, cross_entropy_reference, batch(size), dtype)


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


@pytest.mark.parametrize("size", SIZES[2:], ids=ids)
def test_sce_equals_its_definition_with_the_same_buckets(size: tuple[int, int, int]) -> None:
    states, table, targets = batch(size)
    problem = pose(
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


@pytest.mark.parametrize("align", ["bucket", "rank"])
@pytest.mark.parametrize("reach", [0, 1, 3])
@pytest.mark.parametrize("size", SIZES[2:-1], ids=ids)
def test_rece_equals_its_definition_with_the_same_chunks(
    size: tuple[int, int, int], reach: int, align: str
) -> None:
    states, table, targets = batch(size)
    alone = Alone(size[0], size[1], states.device)
    rows = hash_buckets(table, 12, 4, seed=3, step=2)
    own = hash_buckets(states, 12, 4, seed=3, step=2)
    of_rows, of_own = (gather_histogram(buckets, 12, alone) for buckets in (rows, own))
    chunks = position_chunks(own, of_own, of_rows, 10, align)
    row_chunks = item_chunks(rows, of_rows, 10)

    def ours(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return reduced_cross_entropy(
            states,
            table,
            targets,
            num_buckets=12,
            num_chunks=10,
            num_rounds=4,
            num_neighbor_chunks=reach,
            align=align,
            seed=3,
            step=2,
            reduction="none",
        )

    def reference(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        return reduced_cross_entropy_reference(states, table, targets, chunks, row_chunks, reach)

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
        monkeypatch.setattr(fused_cce, "LEAST_FUSED", least_positions)
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


def test_a_second_backward_through_the_fused_pass_is_refused() -> None:
    states, table, targets = batch((5, 9, 4))
    loss = cut_cross_entropy(states.requires_grad_(), table, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="cut_cross_entropy must run once"):
        loss.backward()


@pytest.mark.parametrize("name", ["cce", "sce", "rece3"])
@pytest.mark.parametrize("scale", [100.0, 3000.0])
def test_saturated_logits_stay_exact(name: str, scale: float) -> None:
    check(everything(name), cross_entropy_reference, batch((37, 101, 12), scale), torch.float32)


def test_more_rounds_over_the_same_candidates_change_nothing() -> None:
    states, table, targets = batch((37, 101, 12))
    one, many = (everything(f"rece{r}")(states, table, targets) for r in (1, 5))
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)


def test_buckets_of_positions_meet_their_own_buckets_of_items() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 16, generator=generator)
    states = rows[:10].repeat(50, 1) + 0.1 * torch.randn(500, 16, generator=generator)
    own_share = {}
    for align in ("bucket", "rank"):
        row_buckets = hash_buckets(rows, 20, 1, seed=0, step=0)
        buckets = hash_buckets(states, 20, 1, seed=0, step=0)
        alone = Alone(500, 2000, rows.device)
        of_rows, of_own = (gather_histogram(b, 20, alone) for b in (row_buckets, buckets))
        chunks = position_chunks(buckets, of_own, of_rows, 20, align)
        row_chunks = item_chunks(row_buckets, of_rows, 20)
        met = chunks[:, None, 0] == row_chunks[None, :, 0]
        same = buckets[:, None, 0] == row_buckets[None, :, 0]
        own_share[align] = float((met & same).sum() / met.sum())
    assert own_share["bucket"] > own_share["rank"] + 0.2


@pytest.mark.parametrize("name", ["cce", "sce", "rece3"])
def test_an_item_above_2_to_24_gets_its_gradient(name: str) -> None:
    num_items = (1 << 24) + 9
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 4, generator=generator)
    table = torch.zeros(num_items, 4)
    table[-1], table[-2] = states[0], 10 * states[0]
    table.requires_grad_()
    targets = torch.tensor([num_items - 1, num_items - 2, num_items - 1])
    if name == "sce":
        loss = scalable_cross_entropy(
            states, table, targets, items_per_bucket=4, seed=0, sparse_grad=True
        )
        assert isinstance(loss, Tensor)
    elif name == "cce":
        loss = cut_cross_entropy(states, table, targets)
    else:
        loss = reduced_cross_entropy(states, table, targets, num_rounds=1, seed=0)
    loss.backward()
    assert table.grad is not None
    gradient = table.grad.to_dense() if table.grad.is_sparse else table.grad
    assert gradient[-1].abs().sum() > 0 and gradient[-2].abs().sum() > 0


def test_draws_reach_items_above_2_to_24() -> None:
    num_items = 1 << 30
    items = Uniform(num_items).draw(torch.arange(100), 100, seed=0, step=0, stream=0)
    assert int(items.max()) > num_items * 0.99 and int(items.unique().numel()) > 9990
    assert (items % 2).float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_scale_positions(reduction: str) -> None:
    states, table, targets = batch((20, 30, 8))
    weights = torch.rand(20, generator=torch.Generator().manual_seed(0))
    weights[3] = 0
    each = cut_cross_entropy(states, table, targets, reduction="none")
    expected = (each * weights).sum() / (weights.sum() if reduction == "mean" else 1)
    ours = cut_cross_entropy(states, table, targets, weights=weights, reduction=reduction)
    torch.testing.assert_close(ours, expected)


def test_normalized_logits_are_cosines_over_the_temperature() -> None:
    states, table, targets = batch((20, 30, 8))
    unit = torch.nn.functional.normalize
    expected = cross_entropy_reference(unit(states) / 0.1, unit(table), targets).mean()
    ours = cut_cross_entropy(states, table, targets, normalize=True, temperature=0.1)
    torch.testing.assert_close(ours, expected)


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


BAD = [
    ({"targets": torch.tensor([0, 30])}, ValueError, r"targets must be in \[0, 30\), got 0..30"),
    ({"targets": torch.tensor([-1, 3])}, ValueError, r"got -1..3"),
    ({"targets": torch.zeros(2)}, TypeError, "targets must be int64, got torch.float32"),
    ({"targets": torch.zeros(3).long()}, ValueError, r"targets must have shape \(2,\)"),
    ({"states": torch.zeros(2, 5)}, ValueError, r"states and table must be \(N, D\)"),
    ({"states": torch.zeros(2, 4).half()}, TypeError, "must share one float dtype"),
    ({"weights": torch.tensor([1.0, -1.0])}, ValueError, "weights must not be negative"),
    ({"reduction": "avg"}, ValueError, "reduction must be one of"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments: dict[str, object] = {
        "states": torch.zeros(2, 4),
        "table": torch.zeros(30, 4),
        "targets": torch.tensor([0, 29]),
    }
    arguments |= change
    states, table, targets = (arguments.pop(name) for name in ("states", "table", "targets"))
    with pytest.raises(error, match=message):
        cut_cross_entropy(states, table, targets, **arguments)  # type: ignore[arg-type]
