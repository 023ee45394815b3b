"""The Triton kernels of the block log-sum-exp against its definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.block_lists import (
    KINDS,
    AnyBlocks,
    assert_as_close_as_definition,
    blocks_of,
    by_autograd,
    draw,
    gathered,
    listed,
    some_targets,
    with_rounds,
)
from tests.kernels.counted import counted_launches
from torch import Tensor

from shardrec.kernels import block_logsumexp
from shardrec.kernels.block_logsumexp import Blocks, EveryPair, schedule


def by_triton(
    states: Tensor, rows: Tensor, blocks: AnyBlocks, grads: tuple[Tensor, Tensor]
) -> list[Tensor]:
    logsumexp, target_logits = block_logsumexp.forward(states, rows, blocks, "triton")
    grad_rows = torch.zeros(rows.shape)
    grad_states = block_logsumexp.backward(
        states, rows, blocks, logsumexp, grads[0], grads[1], grad_rows, "triton"
    )
    return [logsumexp, target_logits, grad_states, grad_rows]


def check(states: Tensor, rows: Tensor, blocks: AnyBlocks, slack: float = 0.0) -> None:
    assert_as_close_as_definition(by_triton, states, rows, blocks, slack)


def by_triton_twice(
    states: Tensor, rows: Tensor, blocks: AnyBlocks, grads: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """The same inputs give the same bits."""
    first, second = (by_triton(states, rows, blocks, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return first


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_the_definition_and_repeat_their_bits(kind: str) -> None:
    states, rows = draw(37, 33, 20, torch.float32)
    assert_as_close_as_definition(by_triton_twice, states, rows, blocks_of(kind, 37, 33))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_wider_than_a_tile(kind: str) -> None:
    check(*draw(9, 35, 132, torch.float32), blocks_of(kind, 9, 35))


@pytest.mark.parametrize("d", [8, 16, 64], ids=lambda d: f"D{d}")
def test_widths_that_fill_their_tile(d: int) -> None:
    states, rows = draw(67, 45, d, torch.float32)
    check(states, rows, EveryPair(45, some_targets(67, 45)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_further_from_the_truth_than_eager(
    kind: str, dtype: torch.dtype
) -> None:
    check(*draw(9, 19, 36, dtype), blocks_of(kind, 9, 19))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_saturate(kind: str) -> None:
    # A log-sum-exp near 400 kept in float32 is uncertain by 1.5e-5, and so is each share.
    states, rows = draw(9, 20, 12, torch.float32, scale=12.0)
    check(states, rows, blocks_of(kind, 9, 20), slack=3e-5)


@pytest.mark.parametrize("n,r", [(1, 1), (1, 70), (70, 1), (5, 0), (0, 5), (0, 0)])
def test_one_or_none_of_anything(n: int, r: int) -> None:
    states, rows = draw(n, r, 4, torch.float32)
    check(states, rows, EveryPair(r, some_targets(n, r)))


@pytest.mark.parametrize("n,r", [(1, 3), (2, 1)])
def test_tiny_listed_blocks(n: int, r: int) -> None:
    states, rows = draw(n, r, 8, torch.float32)
    check(states, rows, listed(n, r, offsets=True))
    check(states, rows, with_rounds(n, r))
    check(states, rows, gathered(n, r, offsets=True))


@pytest.mark.parametrize("kind", ["gathered", "listed"])
def test_lists_of_single_pairs_have_kernels_of_their_own(kind: str) -> None:
    with counted_launches() as launched:
        check(*draw(9, 13, 8, torch.float32), blocks_of(kind, 9, 13))
    ran = {name for name in launched.kernels if name.startswith("gathered")}
    passes = ("forward", "states_backward", "rows_backward")
    expected = {f"gathered_{one}_kernel" for one in passes} if kind == "gathered" else set()
    assert ran == expected


def test_no_block_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    blocks = Blocks(
        none, torch.zeros(1, dtype=torch.int64), none, none, none, some_targets(3, 2), 3
    )
    check(*draw(3, 2, 8, torch.float32), blocks)


def test_a_float16_gradient_far_below_its_smallest_number_survives() -> None:
    states, rows = draw(40, 60, 16, torch.float16, scale=0.1)
    blocks = EveryPair(60, some_targets(40, 60))
    grads = (torch.full((40,), 1e-9), torch.zeros(40))
    truth = by_autograd(states, rows, blocks, torch.float64, grads)
    for ours, true in zip(by_triton(states, rows, blocks, grads)[2:], truth[2:], strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-2, atol=2e-12)


def test_gradients_of_rows_add_to_what_is_there() -> None:
    states, rows = draw(20, 30, 8, torch.float32)
    blocks = listed(20, 30, offsets=False)
    grads = (torch.ones(20), torch.ones(20))
    expected = by_triton(states, rows, blocks, grads)[3] + 3.0
    logsumexp, _ = block_logsumexp.forward(states, rows, blocks, "triton")
    grad_rows = torch.full(rows.shape, 3.0)
    block_logsumexp.backward(states, rows, blocks, logsumexp, *grads, grad_rows, "triton")
    torch.testing.assert_close(grad_rows, expected)


def test_entries_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "ENTRY_FLOATS", 13 * 8)
    check(*draw(11, 45, 8, torch.float32), listed(11, 45, offsets=True))


def test_states_that_are_not_contiguous() -> None:
    states, rows = draw(16, 30, 12, torch.float32)
    check(states.T.contiguous().T, rows[:, :].T.contiguous().T, blocks_of("full", 16, 30))


@pytest.mark.parametrize("kind", ["full", "listed", "gathered"])
def test_the_widest_rows(kind: str) -> None:
    states, rows = draw(2, 3, 1020, torch.float32)
    check(states, rows, blocks_of(kind, 2, 3))


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_list_of_blocks(data: st.DataObject) -> None:
    n, r = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    num_blocks = data.draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def below(bound: int, *shape: int) -> Tensor:
        return torch.randint(0, bound, shape, generator=generator)

    num_pairs = data.draw(st.integers(0, 50)) if num_blocks else 0
    borders = below(2 * r + 1, 2, num_blocks).sort(dim=0).values
    inner = below(num_pairs + 1, max(num_blocks - 1, 0)).sort().values
    ends = torch.tensor([num_pairs] if num_blocks else [], dtype=torch.int64)
    blocks = Blocks(
        pair_positions=below(n, num_pairs),
        pair_starts=torch.cat([torch.zeros(1, dtype=torch.int64), inner, ends]),
        items=below(r, 2 * r),
        item_starts=borders[0],
        item_ends=borders[1],
        targets=some_targets(n, r),
        num_slots=7,
        pair_slots=below(7, num_pairs),
        offsets=torch.randn(2 * r, generator=generator) if data.draw(st.booleans()) else None,
    )
    check(*draw(n, r, 12, torch.float32), blocks)
