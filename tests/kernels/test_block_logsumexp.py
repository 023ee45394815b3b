from __future__ import annotations

import pytest
import torch
from tests.tolerance import assert_as_close_as_eager
from torch import Tensor

from shardrec.kernels.block_logsumexp import (
    Blocks,
    Rounds,
    RowIds,
    backward,
    cpu,
    every_pair,
    forward,
)
from shardrec.kernels.block_logsumexp.cpu_tiles import CpuTiles, core_cache_bytes, cpu_tiles
from shardrec.kernels.block_logsumexp.reference import block_logsumexp_reference

NUM_POSITIONS, NUM_ROWS, WIDTH = 23, 31, 6


def listed(with_rounds: bool, ascending: bool = False) -> Blocks:
    """Blocks of uneven sizes: an empty one, repeats of items, overlaps, targets elsewhere."""
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(NUM_POSITIONS, generator=generator)
    targets = torch.randint(-1, NUM_ROWS, (NUM_POSITIONS,), generator=generator)
    items = torch.randint(0, NUM_ROWS, (60,), generator=generator)
    items = items.sort().values if ascending else items
    pair_starts = torch.tensor([0, 9, 9, 10, 23])
    item_starts, item_ends = torch.tensor([0, 5, 40, 17]), torch.tensor([20, 9, 40, 60])
    rounds = None
    if with_rounds:
        order, pair_starts = order.repeat(2), torch.tensor([0, 9, 9, 23, 33, 46])
        item_starts = torch.tensor([0, 5, 10, 31, 17])
        item_ends = torch.tensor([31, 9, 31, 60, 60])
        # Within a round a row stands once, as the rule against counting twice presumes.
        items = torch.cat([torch.arange(31), torch.randperm(31, generator=generator)[:29]])
        rounds = Rounds(
            torch.randint(0, 4, (NUM_POSITIONS, 2), generator=generator).int(),
            torch.randint(0, 4, (NUM_ROWS, 2), generator=generator).int(),
            1,
            torch.tensor([0, 0, 0, 1, 1]),
        )
    return Blocks(
        pair_positions=order,
        pair_starts=pair_starts,
        items=items,
        item_starts=item_starts,
        item_ends=item_ends,
        targets=targets,
        num_slots=NUM_POSITIONS,
        offsets=torch.rand(60, generator=generator),
        rounds=rounds,
    )


CASES = {
    "full": every_pair(NUM_ROWS, torch.arange(NUM_POSITIONS) - 1),
    "listed": listed(with_rounds=False),
    "rounds": listed(with_rounds=True),
    "ascending": listed(with_rounds=False, ascending=True),
}


@pytest.mark.parametrize("tile", [8, 64, 100])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_definition(case: str, tile: int) -> None:
    tiles = CpuTiles(tile, 5, 7, tile, 1) if tile < 100 else CpuTiles()
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(NUM_POSITIONS, WIDTH, generator=generator)
    rows = torch.randn(NUM_ROWS, WIDTH, generator=generator)
    grads = torch.rand(2, NUM_POSITIONS, generator=generator)
    blocks = CASES[case]
    truth = by_definition(states.double(), rows.double(), blocks, grads.double())
    eager = by_definition(states, rows, blocks, grads)
    logsumexp, target_logits = cpu.forward(states, rows, blocks, tiles)
    grad_rows = torch.ones_like(rows)
    grad_states = cpu.backward(
        states, rows, blocks, logsumexp, grads[0], grads[1], grad_rows, tiles
    )
    finite = truth[0].isfinite()
    assert torch.equal(logsumexp.isfinite(), finite)
    ours = [logsumexp[finite], target_logits, grad_states, grad_rows - 1]
    truth[0], eager[0] = truth[0][finite], eager[0][finite]
    for mine, theirs, right in zip(ours, eager, truth, strict=True):
        assert_as_close_as_eager(mine, theirs, right)


def test_the_tiles_of_a_machine_fill_the_caches_of_its_threads() -> None:
    tiles, num_threads = cpu_tiles(), min(torch.get_num_threads(), 8)
    assert tiles.positions <= tiles.logits // tiles.positions * 2
    filled = tiles.logits * 4 / (num_threads * core_cache_bytes())
    assert 1 < filled <= 2 or tiles.logits == 1 << 19


def test_padded_pairs_with_huge_logits_leave_no_trace() -> None:
    """Blocks of one and two pairs in one batch: the padding repeats a pair that must not count."""
    states, rows = 1e4 * torch.ones(3, 4), torch.ones(2, 4)
    blocks = Blocks(
        pair_positions=torch.arange(3),
        pair_starts=torch.tensor([0, 2, 3]),
        items=torch.tensor([0, 1, 0, 1]),
        item_starts=torch.tensor([0, 2]),
        item_ends=torch.tensor([2, 4]),
        targets=torch.tensor([-1, -1, -1]),
        num_slots=3,
    )
    logsumexp, _ = cpu.forward(states, rows, blocks)
    assert torch.allclose(logsumexp, torch.full((3,), 4e4 + 0.6931))
    grad_rows = torch.zeros(2, 4)
    grad_states = cpu.backward(
        states, rows, blocks, logsumexp, torch.ones(3), torch.zeros(3), grad_rows
    )
    torch.testing.assert_close(grad_states, torch.ones(3, 4))
    torch.testing.assert_close(grad_rows, torch.full((2, 4), 1.5e4))


def by_definition(states: Tensor, rows: Tensor, blocks: Blocks, grads: Tensor) -> list[Tensor]:
    states, rows = states.clone().requires_grad_(), rows.clone().requires_grad_()
    logsumexp, target_logits = block_logsumexp_reference(states, rows, blocks)
    finite = logsumexp.isfinite()
    total = (logsumexp[finite] * grads[0][finite]).sum() + (target_logits * grads[1]).sum()
    gradients = torch.autograd.grad(total, (states, rows))
    return [logsumexp.detach(), target_logits.detach(), *gradients]


def test_a_slot_without_candidates_is_minus_infinity_and_has_no_gradient() -> None:
    blocks = every_pair(1, torch.tensor([0, -1]))
    states, rows = torch.ones(2, 4), torch.ones(1, 4)
    logsumexp, target_logits = forward(states, rows, blocks)
    assert logsumexp.tolist() == [-torch.inf, 4.0] and target_logits.tolist() == [4.0, 0.0]
    grad_rows = torch.zeros(1, 4)
    grad_states = backward(
        states, rows, blocks, logsumexp, torch.tensor([1.0, 0.0]), torch.zeros(2), grad_rows
    )
    assert not grad_states.any() and not grad_rows.any()


def test_an_empty_shard_gives_nothing() -> None:
    states, rows = torch.ones(2, 4), torch.zeros(0, 4)
    logsumexp, target_logits = forward(states, rows, every_pair(0, torch.tensor([-1, -1])))
    assert logsumexp.tolist() == [-torch.inf] * 2 and target_logits.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("count", [0, 3, 60])
def test_rows_are_found_alike_by_search_and_by_table(count: int) -> None:
    within = RowIds(first=100, count=64)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(count))[:count].sort().values
    some = RowIds.of(rows, within)
    assert (some.places is None) == (count < 4)  # a table pays from a sixteenth on
    items = torch.arange(90, 180).reshape(2, 45)
    searched = RowIds(100, count, rows + 100).find(items)
    assert torch.equal(some.find(items), searched)
    assert int((searched >= 0).sum()) == count
