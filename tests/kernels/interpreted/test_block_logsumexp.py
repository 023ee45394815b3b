"""The Triton kernels of the block log-sum-exp against its definition in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tolerance import assert_as_close_as_eager
from torch import Tensor

from shardrec.kernels import block_logsumexp
from shardrec.kernels.block_logsumexp import Blocks, Rounds, every_pair
from shardrec.kernels.block_logsumexp.gpu import gathered as gpu_gathered
from shardrec.kernels.block_logsumexp.gpu import listed as gpu_listed
from shardrec.kernels.block_logsumexp.reference import block_logsumexp_reference


def draw(n: int, r: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + r * 10 + d)
    states = torch.randn(n, d, generator=generator) * scale * d**-0.25
    rows = torch.randn(r, d, generator=generator) * scale * d**-0.25
    return states.to(dtype), rows.to(dtype)


def some_targets(n: int, r: int) -> Tensor:
    """Targets with repeats; every fifth is on another shard."""
    targets = torch.arange(n) * 7 % max(r, 1)
    return torch.where((torch.arange(n) % 5 == 4) | (r == 0), -1, targets)


def listed(n: int, r: int, *, offsets: bool) -> Blocks:
    """Blocks of uneven sizes, one without pairs, one without items; items repeat and overlap."""
    generator = torch.Generator().manual_seed(n + r)
    starts = torch.tensor([0, n // 3, n // 3, n - 1, n])
    items = torch.randint(0, r, (2 * r + 3,), generator=generator)
    return Blocks(
        pair_positions=torch.randperm(n, generator=generator),
        pair_starts=starts,
        items=items,
        item_starts=torch.tensor([0, 2, r // 2, r]),
        item_ends=torch.tensor([r + 1, r, r // 2, 2 * r + 3]),
        targets=some_targets(n, r),
        num_slots=n,
        offsets=torch.randn(2 * r + 3, generator=generator) if offsets else None,
    )


def gathered(n: int, r: int, *, offsets: bool) -> Blocks:
    """A list of its own for every other position: of uneven lengths, one without items."""
    generator = torch.Generator().manual_seed(n * r)
    positions = torch.randperm(n, generator=generator)[: (n + 1) // 2]
    sizes = torch.randint(0, 40, positions.shape, generator=generator)
    sizes[-1] = 0
    ends = sizes.cumsum(0)
    num_items = int(sizes.sum())
    return Blocks(
        pair_positions=positions,
        pair_starts=torch.arange(positions.numel() + 1),
        items=torch.randint(0, r, (num_items,), generator=generator),
        item_starts=ends - sizes,
        item_ends=ends,
        targets=some_targets(n, r),
        num_slots=n,
        offsets=torch.randn(num_items, generator=generator) if offsets else None,
    )


def with_slots(n: int, r: int) -> Blocks:
    """Two blocks that share positions, a slot for each pair and one slot that two pairs share."""
    blocks = listed(n, r, offsets=False)
    positions = torch.cat([torch.arange(n), torch.arange(0, n, 2)])
    num_pairs = positions.numel()
    slots = torch.randperm(num_pairs, generator=torch.Generator().manual_seed(1))
    slots[0] = slots[-1]
    return replace(
        blocks,
        pair_positions=positions,
        pair_starts=torch.tensor([0, n, n, num_pairs, num_pairs]),
        item_ends=torch.tensor([r + 1, r, r // 2 + 1, 2 * r + 3]),
        pair_slots=slots,
        num_slots=num_pairs + 1,
    )


def with_rounds(n: int, r: int) -> Blocks:
    """Three rounds of four chunks that reach one to each side, as rece lists them."""
    generator = torch.Generator().manual_seed(n - r)
    position_chunks = torch.randint(0, 4, (n, 3), generator=generator, dtype=torch.int32)
    item_chunks = torch.randint(0, 4, (r, 3), generator=generator, dtype=torch.int32)
    sorted_chunks, order = item_chunks.T.contiguous().sort(dim=1, stable=True)
    chunk = torch.arange(4, dtype=torch.int32)
    pairs, starts, ends, sizes = [], [], [], []
    for index in range(3):
        line = sorted_chunks[index].contiguous()
        pairs.append(torch.argsort(position_chunks[:, index], stable=True))
        sizes.append(torch.bincount(position_chunks[:, index], minlength=4))
        starts.append(torch.searchsorted(line, chunk - 1) + index * r)
        ends.append(torch.searchsorted(line, chunk + 1, right=True) + index * r)
    return Blocks(
        pair_positions=torch.cat(pairs),
        pair_starts=torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(sizes).cumsum(0)]),
        items=order.flatten(),
        item_starts=torch.cat(starts),
        item_ends=torch.cat(ends),
        targets=some_targets(n, r),
        num_slots=n,
        rounds=Rounds(position_chunks, item_chunks, 1, torch.arange(3).repeat_interleave(4)),
    )


def blocks_of(kind: str, n: int, r: int) -> Blocks:
    return {
        "full": lambda: every_pair(r, some_targets(n, r)),
        "listed": lambda: listed(n, r, offsets=False),
        "offsets": lambda: listed(n, r, offsets=True),
        "gathered": lambda: gathered(n, r, offsets=False),
        "gathered-offsets": lambda: gathered(n, r, offsets=True),
        "slots": lambda: with_slots(n, r),
        "rounds": lambda: with_rounds(n, r),
    }[kind]()


def by_autograd(
    states: Tensor, rows: Tensor, blocks: Blocks, dtype: torch.dtype, grads: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Values and gradients of the definition in a dtype."""
    states = states.detach().to(dtype).requires_grad_()
    rows = rows.detach().to(dtype).requires_grad_()
    logsumexp, target_logits = block_logsumexp_reference(states, rows, blocks)
    has = logsumexp > -torch.inf
    total = (logsumexp[has] * grads[0][has].to(dtype)).sum()
    total = total + (target_logits * grads[1].to(dtype)).sum()
    grad_states, grad_rows = torch.autograd.grad(total, (states, rows), materialize_grads=True)
    return [logsumexp.detach(), target_logits.detach(), grad_states, grad_rows]


def by_triton(
    states: Tensor, rows: Tensor, blocks: Blocks, grads: tuple[Tensor, Tensor]
) -> list[Tensor]:
    logsumexp, target_logits = block_logsumexp.forward(states, rows, blocks, "triton")
    grad_rows = torch.zeros(rows.shape)
    grad_states = block_logsumexp.backward(
        states, rows, blocks, logsumexp, grads[0], grads[1], grad_rows, "triton"
    )
    return [logsumexp, target_logits, grad_states, grad_rows]


def check(states: Tensor, rows: Tensor, blocks: Blocks, slack: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(5)
    grad_logsumexp = torch.randn(blocks.num_slots, generator=generator)
    grad_logsumexp[::4] = 0.0
    grads = (grad_logsumexp, torch.randn(states.shape[0], generator=generator))
    truth = by_autograd(states, rows, blocks, torch.float64, grads)
    eager = by_autograd(states, rows, blocks, states.dtype, grads)
    for ours, yardstick, true in zip(
        by_triton(states, rows, blocks, grads), eager, truth, strict=True
    ):
        assert ours.dtype is torch.float32
        assert torch.equal(ours == -torch.inf, true == -torch.inf)
        finite = true.nan_to_num(neginf=0.0)
        assert_as_close_as_eager(
            ours.nan_to_num(neginf=0.0), yardstick.nan_to_num(neginf=0.0), finite, slack
        )


KINDS = ("full", "listed", "offsets", "gathered", "gathered-offsets", "slots", "rounds")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [20, 132], ids=lambda d: f"D{d}")
def test_values_and_gradients_equal_the_definition(kind: str, d: int) -> None:
    states, rows = draw(37, 33, d, torch.float32)
    check(states, rows, blocks_of(kind, 37, 33))


@pytest.mark.parametrize("d", [8, 16, 64], ids=lambda d: f"D{d}")
def test_widths_that_fill_their_tile(d: int) -> None:
    states, rows = draw(67, 45, d, torch.float32)
    check(states, rows, every_pair(45, some_targets(67, 45)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_further_from_the_truth_than_eager(
    kind: str, dtype: torch.dtype
) -> None:
    states, rows = draw(17, 35, 36, dtype)
    check(states, rows, blocks_of(kind, 17, 35))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_that_saturate(kind: str) -> None:
    # A log-sum-exp near 400 kept in float32 is uncertain by 1.5e-5, and so is each share.
    states, rows = draw(33, 40, 12, torch.float32, scale=12.0)
    check(states, rows, blocks_of(kind, 33, 40), slack=3e-5)


@pytest.mark.parametrize("n,r", [(1, 1), (1, 70), (70, 1), (5, 0), (0, 5), (0, 0)])
def test_one_or_none_of_anything(n: int, r: int) -> None:
    states, rows = draw(n, r, 4, torch.float32)
    check(states, rows, every_pair(r, some_targets(n, r)))


@pytest.mark.parametrize("n,r", [(1, 3), (2, 1)])
def test_tiny_listed_blocks(n: int, r: int) -> None:
    states, rows = draw(n, r, 8, torch.float32)
    check(states, rows, listed(n, r, offsets=True))
    check(states, rows, with_rounds(n, r))
    check(states, rows, gathered(n, r, offsets=True))


@pytest.mark.parametrize("kind", ["gathered", "listed"])
def test_lists_of_single_pairs_have_kernels_of_their_own(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    for function in ("forward", "backward"):
        original = getattr(gpu_gathered, function)

        def spy(*args: object, f: str = function, g: object = original) -> None:
            ran.append(f)
            g(*args)  # type: ignore[operator]

        monkeypatch.setattr(gpu_gathered, function, spy)
    check(*draw(9, 13, 8, torch.float32), blocks_of(kind, 9, 13))
    assert ran == (["forward", "backward"] if kind == "gathered" else [])


def test_no_block_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    blocks = Blocks(
        none, torch.zeros(1, dtype=torch.int64), none, none, none, some_targets(3, 2), 3
    )
    check(*draw(3, 2, 8, torch.float32), blocks)


def test_a_float16_gradient_far_below_its_smallest_number_survives() -> None:
    states, rows = draw(40, 60, 16, torch.float16, scale=0.1)
    blocks = every_pair(60, some_targets(40, 60))
    grads = (torch.full((40,), 1e-9), torch.zeros(40))
    truth = by_autograd(states, rows, blocks, torch.float64, grads)
    for ours, true in zip(by_triton(states, rows, blocks, grads)[2:], truth[2:], strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=2e-2, atol=2e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_inputs_give_the_same_bits(kind: str) -> None:
    states, rows = draw(20, 41, 24, torch.float32)
    blocks = blocks_of(kind, 20, 41)
    grads = (torch.ones(blocks.num_slots), torch.ones(20))
    first = by_triton(states, rows, blocks, grads)
    second = by_triton(states, rows, blocks, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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
    monkeypatch.setattr(gpu_listed, "LEAST_ENTRIES", 13)
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
