"""Scores of a memory equal a dense matrix product, and ranking with them a sort of the catalog."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.modules.shares import on_every_number_of_ranks
from tests.ranks import Ranks
from torch import Tensor

from shardrec.kernels.shard import RowShard
from shardrec.modules.memory import Memory, memory_bytes, recent_items
from shardrec.modules.ranking import Blocks, tie_keys, top_items

NUM_ITEMS = 41


def memory_of(seed: int = 0, num_items: int = NUM_ITEMS, **options: Any) -> Memory:
    """Lists of up to 7 successors, some empty; strengths are quarters, so that sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 8, (num_items,), generator=generator)
    lists = [torch.randperm(num_items, generator=generator)[:n] for n in lengths.tolist()]
    strengths = torch.randint(1, 9, (int(lengths.sum()),), generator=generator) / 4
    return Memory(
        offsets=torch.cat([lengths[:0], torch.tensor([0]), lengths]).cumsum(0),
        successors=torch.cat(lists).int(),
        strengths=strengths,
        **({"scale": 2.0, "ages": 3, "decay": 0.5} | options),
    )


def among(memory: Memory, low: int, high: int) -> Memory:
    """The part of a rank that holds rows [low, high)."""
    kept = (memory.successors >= low) & (memory.successors < high)
    owner = torch.repeat_interleave(memory.offsets.diff())[kept]
    counts = torch.bincount(owner, minlength=len(memory.offsets) - 1)
    return dataclasses.replace(
        memory,
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        successors=memory.successors[kept],
        strengths=memory.strengths[kept],
    )


def dense(memory: Memory) -> Tensor:
    """(V, V) float64 strengths."""
    num_items = len(memory.offsets) - 1
    matrix = torch.zeros(num_items, num_items, dtype=torch.float64)
    owner = torch.repeat_interleave(memory.offsets.diff())
    matrix[owner, memory.successors.long()] = memory.strengths.double()
    return matrix


def dense_scores(memory: Memory, recent: Tensor) -> Tensor:
    """(B, V) float64: scale * sum_a decay**a M[h_a]."""
    total = torch.zeros(len(recent), len(memory.offsets) - 1, dtype=torch.float64)
    for row, items in enumerate(recent.tolist()):
        for age, item in enumerate(items):
            if item >= 0:
                total[row] += memory.scale * memory.decay**age * dense(memory)[item]
    return total


def recent_of(num_states: int, ages: int = 3, seed: int = 1) -> Tensor:
    """Recent items, some repeated, some missing at the end, one state without any."""
    generator = torch.Generator().manual_seed(seed)
    recent = torch.randint(0, NUM_ITEMS, (num_states, ages), generator=generator)
    recent[0] = recent[0, 0]
    recent[1, 1:] = -1
    recent[2] = -1
    return recent


@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "decay": 0.7}, {"ages": 1}])
def test_scores_are_those_of_a_dense_matrix(options: dict[str, Any]) -> None:
    memory = memory_of(**options)
    recent = recent_of(9, memory.ages)
    pairs = memory.scores(recent)
    found = torch.zeros(9, NUM_ITEMS)
    found[pairs.states, pairs.items] = pairs.scores
    expected = dense_scores(memory, recent)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert len(pairs.items) == int((expected > 0).sum()) > 20
    assert pairs.items.tolist() == sorted(pairs.items.tolist())


def test_scores_of_no_state_are_empty() -> None:
    pairs = memory_of().scores(torch.zeros(0, 3, dtype=torch.int64))
    assert len(pairs.items) == len(pairs.states) == len(pairs.scores) == 0


def test_a_full_memory_takes_the_bytes_that_are_planned() -> None:
    lists = torch.stack([torch.randperm(NUM_ITEMS)[:5] for _ in range(NUM_ITEMS)])
    memory = Memory(
        offsets=torch.arange(NUM_ITEMS + 1) * 5,
        successors=lists.flatten().int(),
        strengths=torch.ones(lists.numel()),
    )
    tensors = (memory.offsets, memory.successors, memory.strengths)
    assert sum(tensor.nbytes for tensor in tensors) == memory_bytes(NUM_ITEMS, 5, 1)
    assert memory_bytes(NUM_ITEMS, 5, 5) - 8 * (NUM_ITEMS + 1) == 8 * NUM_ITEMS


def test_another_catalog_keeps_what_it_knows() -> None:
    memory = memory_of()
    places = torch.tensor([5, -1, 40, 0, 17, -1, 3, 22])  # items of the memory's catalog
    other = memory.relabeled(places)
    known = places >= 0
    expected = torch.zeros(8, 8, dtype=torch.float64)
    rows = known.nonzero()[:, 0]
    expected[rows[:, None], rows] = dense(memory)[places[known][:, None], places[known]]
    assert torch.equal(dense(other), expected)
    everything = memory.relabeled(torch.randperm(NUM_ITEMS, generator=torch.Generator()))
    assert len(everything.successors) == len(memory.successors)


def test_recent_items_pass_over_padding_and_what_is_no_history() -> None:
    items = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [9, 0, 0, 0]])
    lengths = torch.tensor([4, 2, 0])
    real = torch.arange(4) < lengths[:, None]
    expected = [[6, 5, 4], [8, 7, -1], [-1, -1, -1]]
    assert recent_items(items, real, 3).tolist() == expected
    assert recent_items(items, real & (items != 5), 2).tolist() == [[6, 4], [8, 7], [-1, -1]]
    assert recent_items(items[:0], real[:0], 3).shape == (0, 3)


def rank_a_share(row_edges: list[int], user_edges: list[int], hide: bool) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    low, high = row_edges[rank : rank + 2]
    first, last = user_edges[rank : rank + 2]
    states, table, recent, seen, allowed = problem()
    shard = RowShard(table[low:high], low, NUM_ITEMS, dist.group.WORLD)
    part = [seen[user] for user in range(first, last)]
    lengths = torch.tensor([len(items) for items in part], dtype=torch.int64)
    pairs = torch.tensor(sum(part, []), dtype=torch.int64), lengths
    return top_items(
        states[first:last],
        shard,
        9,
        seen=pairs if hide else None,
        allowed=allowed if hide else None,
        memory=among(memory_of(), low, high),
        recent=recent[first:last],
        blocks=Blocks(states=5, rows=7),
    )


def problem() -> tuple[Tensor, Tensor, Tensor, list[list[int]], Tensor]:
    """Whole numbers: every sum is exact, and ties are everywhere."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randint(-2, 3, (13, 6), generator=generator).float()
    table = torch.randint(-2, 3, (NUM_ITEMS, 6), generator=generator).float()
    seen = [torch.randperm(NUM_ITEMS, generator=generator)[: u % 5].tolist() for u in range(13)]
    return states, table, recent_of(13), seen, torch.rand(NUM_ITEMS, generator=generator) < 0.8


@pytest.mark.parametrize("hide", [False, True], ids=["all", "hidden"])
@on_every_number_of_ranks
def test_ranking_equals_a_full_sort_on_every_number_of_ranks(
    ranks: Ranks, row_edges: list[int], user_edges: list[int], hide: bool
) -> None:
    parts = ranks(len(row_edges) - 1).run(rank_a_share, row_edges, user_edges, hide)
    scores, items = (torch.cat(column) for column in zip(*parts, strict=True))
    states, table, recent, seen, allowed = problem()
    alone = states.double() @ table.double().T
    both = alone + dense_scores(memory_of(), recent)
    keys = tie_keys(torch.arange(NUM_ITEMS)).tolist()
    moved = 0
    for user in range(13):
        left = [i for i in range(NUM_ITEMS) if not hide or (allowed[i] and i not in seen[user])]
        best = sorted(left, key=lambda i: (-float(both[user, i]), keys[i]))[:9]
        assert items[user].tolist() == best
        assert scores[user].tolist() == both[user, best].tolist()
        moved += best != sorted(left, key=lambda i: (-float(alone[user, i]), keys[i]))[:9]
    assert moved > 8, "the memory changes lists"


@pytest.mark.parametrize(
    ("recent", "message"),
    [
        (None, "memory and recent items must come together"),
        (torch.zeros(13, 2, dtype=torch.int64), r"int64 of shape \(13, 3\), got torch.int64 of"),
        (torch.zeros(13, 3), "got torch.float32"),
        (torch.full((13, 3), NUM_ITEMS), r"must be items in \[0, 41\), or -1, got 41 to 41"),
        (torch.full((13, 3), -2), "got -2 to -2"),
    ],
)
def test_wrong_recent_items_are_refused(recent: Tensor | None, message: str) -> None:
    states, table, *_ = problem()
    shard = RowShard(table, 0, NUM_ITEMS, None)
    with pytest.raises(ValueError, match=message):
        top_items(states, shard, 3, memory=memory_of(), recent=recent)
