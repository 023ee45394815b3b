from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.kernels.block_lists import (
    KINDS,
    AnyBlocks,
    assert_as_close_as_definition,
    blocks_of,
    draw,
)
from torch import Tensor

from shardrec.kernels.block_logsumexp import (
    Blocks,
    EveryPair,
    RowIds,
    backward,
    cpu,
    forward,
)
from shardrec.kernels.block_logsumexp.cpu_tiles import CpuTiles, core_cache_bytes, cpu_tiles


def blocks_for_cpu(kind: str) -> AnyBlocks:
    """Of the kinds that Triton is tested with too, or of one that only a CPU treats differently."""
    if kind == "full":
        return blocks_of(kind, 23, 31)
    of = {"ascending": "offsets", "rounds-offsets": "rounds"}
    blocks = blocks_of(of.get(kind, kind), 23, 31)
    assert isinstance(blocks, Blocks) and blocks.pair_positions is not None
    if kind == "ascending":
        return replace(blocks, items=blocks.items.sort().values)
    if kind == "rounds-offsets":
        generator = torch.Generator().manual_seed(1)
        return replace(blocks, offsets=torch.rand(len(blocks.items), generator=generator))
    # Blocks of a round must not share a slot, though Triton adds up those that do.
    own_slots = torch.arange(len(blocks.pair_positions)) if kind == "slots" else None
    return replace(blocks, pair_slots=own_slots)


@pytest.mark.parametrize("tile", [8, 64, 100])
@pytest.mark.parametrize("kind", [*KINDS, "ascending", "rounds-offsets"])
def test_values_and_gradients_equal_the_definition(kind: str, tile: int) -> None:
    tiles = CpuTiles(tile, 5, 7, tile, 1) if tile < 100 else CpuTiles()

    def on_cpu(
        states: Tensor, rows: Tensor, blocks: AnyBlocks, grads: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        logsumexp, target_logits = cpu.forward(states, rows, blocks, tiles)
        grad_rows = torch.ones_like(rows)
        grad_states = cpu.backward(states, rows, blocks, logsumexp, *grads, grad_rows, tiles)
        return [logsumexp, target_logits, grad_states, grad_rows - 1]

    states, rows = draw(23, 31, 6, torch.float32)
    assert_as_close_as_definition(on_cpu, states, rows, blocks_for_cpu(kind))


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


def test_a_slot_without_candidates_is_minus_infinity_and_has_no_gradient() -> None:
    blocks = EveryPair(1, torch.tensor([0, -1]))
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
    logsumexp, target_logits = forward(states, rows, EveryPair(0, torch.tensor([-1, -1])))
    assert logsumexp.tolist() == [-torch.inf] * 2 and target_logits.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("count", [0, 3, 60])
def test_rows_are_found_alike_by_search_and_by_table(count: int) -> None:
    within = RowIds(first=100, count=64)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(count))[:count].sort().values
    some = RowIds.of(rows, within)
    assert (some.lookup is None) == (count < 4)  # a table pays from a sixteenth on
    items = torch.arange(90, 180).reshape(2, 45)
    searched = RowIds(100, count, rows + 100).find(items)
    assert torch.equal(some.find(items), searched)
    assert int((searched >= 0).sum()) == count
    # What is known to be there is found without a look at what is not.
    present = rows.flip(0).reshape(1, -1) + 100
    for whole in (within, RowIds(first=100, count=64, is_complete=True)):
        assert RowIds.of(rows, whole).find(present).tolist() == [list(range(count))[::-1]]
