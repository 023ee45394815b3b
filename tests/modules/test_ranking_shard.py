"""One shard's search: ties, pruning and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardrec.kernels.select import top_lowest
from shardrec.kernels.shard import RowShard
from shardrec.modules.ranking import Blocks, ranks_in_lists, tie_keys, top_items


@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
def test_orders_that_defeat_pruning_change_nothing(order: str) -> None:
    table = {
        "rising": torch.arange(5_000.0),
        "falling": -torch.arange(5_000.0),
        "equal": torch.zeros(5_000),
    }[order][:, None]
    visited = tie_keys(torch.arange(5_000)).argsort()
    states = torch.tensor([[1.0], [-1.0], [0.0]])
    values, places = (states @ table.T).sort(dim=1, descending=True, stable=True)
    expected = visited[places]
    table = torch.empty_like(table).index_copy_(0, visited, table)
    shard, blocks = RowShard(table, 0, 5_000, None), Blocks(rows=300)
    scores, items = top_items(states, shard, 7, blocks=blocks)
    assert torch.equal(items, expected[:, :7])
    assert torch.equal(scores, values[:, :7])
    targets = expected[:, [0, 6, 2_500, 4_999]]
    _, everything = top_items(states, shard, 5_000, blocks=blocks)
    wanted = targets.flatten(), torch.tensor([4, 4, 4])
    places = ranks_in_lists(everything, wanted, missing=5_000)
    assert places.tolist() == [0, 6, 2_500, 4_999] * 3


class LargestResult(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.numel = max(self.numel, part.numel())
        return result


def test_memory_is_bounded_by_a_block_and_not_by_the_catalog() -> None:
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(300, 4, generator=generator)
    table = torch.randn(40_000, 4, generator=generator)
    shard, blocks = RowShard(table, 0, 40_000, None), Blocks(states=32, rows=5_000)
    with LargestResult() as largest:
        top_items(states, shard, 10, blocks=blocks)
    assert largest.numel <= max(32 * 5_000, table.numel())
    assert largest.numel < 300 * 40_000 / 50


def test_equal_rows_rank_by_key_whatever_tile_they_fall_in() -> None:
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(50, 64, generator=generator)
    table = torch.randn(40, 64, generator=generator).repeat(25, 1)  # each row 25 times
    shard, blocks = RowShard(table, 0, 1000, None), Blocks(states=50, rows=160)
    _, items = top_items(states, shard, 30, blocks=blocks)
    copies = items[:, :1] % 40 + 40 * torch.arange(25)
    copies = copies.gather(1, tie_keys(copies).argsort(1))
    assert torch.equal(items[:, :25], copies)
    for copy in (0, 7, 24):
        wanted = copies[:, copy], torch.ones(50, dtype=torch.int64)
        assert (ranks_in_lists(items, wanted, missing=1000) == copy).all()


@pytest.mark.parametrize("num_columns", [3, 8, 50])
def test_top_lowest_is_a_stable_sort(num_columns: int) -> None:
    generator = torch.Generator().manual_seed(num_columns)
    scores = torch.randint(0, 4, (200, num_columns), generator=generator).float()
    values, order = scores.sort(dim=1, descending=True, stable=True)
    found_values, found_order = top_lowest(scores, 3)
    assert torch.equal(found_values, values[:, :3])
    assert torch.equal(found_order, order[:, :3])


def test_blocks_that_hold_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks must have states >= 1"):
        Blocks(states=0)
    with pytest.raises(ValueError, match="rows in"):
        Blocks(rows=2**25)
